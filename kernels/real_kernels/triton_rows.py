"""Triton: what follows the GEMM row by row: the log-sum-exp over tiles, and dL/dz from what the GEMM saved."""

from __future__ import annotations

import triton
import triton.language as tl

from real_kernels.triton_gemm import LN_2, LOG2_E, UNALIGNED, put_selected, sum_of_dlogp


@triton.jit(do_not_specialize=["n"])
def scale_kernel(source, target, factor, n, BLOCK: tl.constexpr):
    """target = source times a float32 number on the device, in float32: a 16-bit factor would be off by up to 0.4 %."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source + at, mask=at < n, other=0.0).to(tl.float32) * tl.load(factor).to(tl.float32)
    tl.store(target + at, x.to(target.dtype.element_ty), mask=at < n)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=UNALIGNED)
def combine_kernel(
    tile_max,  # [tiles, n], bits: what the tile's sum is relative to
    tile_sum,  # [tiles, n]
    tile_ez,  # [tiles, n], bits
    selected,  # [n, m] logits, before the temperature
    row_max,  # [n], bits: the largest of tile_max
    log_sum,  # [n]: log-sum-exp minus row_max, bits
    logp,  # [n, m], nats
    entropy,  # [n], nats
    n,
    tiles,
    m,
    inverse_temperature,
    ENTROPY: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Log-sum-exp of each row from its tiles', and the selected tokens' log-probabilities. All float32."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < n
    # Finite, so that no tile's -inf minus it is NaN; far below any logit.
    peak = tl.full((BLOCK_ROWS,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    weighted = tl.zeros((BLOCK_ROWS,), tl.float32)
    for t in range(0, tiles, BLOCK_TILES):
        tile = t + tl.arange(0, BLOCK_TILES)
        at = tile.to(tl.int64)[:, None] * n + rows[None, :]
        mask = (tile < tiles)[:, None] & row_mask[None, :]
        top = tl.load(tile_max + at, mask=mask, other=float("-inf"))
        new = tl.maximum(peak, tl.max(top, 0))
        shift = top - new[None, :]
        scale = tl.math.exp2(shift)
        part = tl.load(tile_sum + at, mask=mask, other=0.0)
        before = tl.math.exp2(peak - new)
        if ENTROPY:
            ez = tl.load(tile_ez + at, mask=mask, other=0.0)
            weighted = before * (weighted + total * (peak - new))
            weighted += tl.sum(tl.where(scale > 0, scale * (ez + part * shift), 0.0), 0)
        total = total * before + tl.sum(part * scale, 0)
        peak = new
    norm = tl.math.log2(total)
    tl.store(row_max + rows, peak, mask=row_mask)
    tl.store(log_sum + rows, norm, mask=row_mask)
    if ENTROPY:
        tl.store(entropy + rows, (norm - weighted / total) * LN_2, mask=row_mask)
    for k in range(m):
        z = tl.load(selected + rows * m + k, mask=row_mask, other=0.0)
        # Rounded once, as the GEMM's epilogue has it.
        l_k = (z * (inverse_temperature * LOG2_E) - peak - norm) * LN_2
        # Never above 0: rounding of the sum must not make a probability above 1. A minimum would make 0 of NaN.
        tl.store(logp + rows * m + k, tl.where(l_k > 0, 0.0, l_k), mask=row_mask)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=UNALIGNED)
def dlogits_kernel(
    saved,  # [n, V] exp(z - tile maximum), overwritten by dL/dz
    ids,
    tile_max,
    row_max,
    log_sum,
    dlogp,
    logp,
    n,
    width,  # of a row, the padding included
    m,
    stride,
    inverse_temperature,
    SHARED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BN: tl.constexpr,
):
    """In place: dL/dz = -U p, and the selected columns from float32 values. Grid: (tiles of the GEMM, row blocks)."""
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = tl.program_id(0)
    columns = tl.arange(0, BN)
    row_mask = rows < n
    total = sum_of_dlogp(dlogp, rows, row_mask, m, SHARED) * inverse_temperature
    shift = tl.load(tile_max + tile.to(tl.int64) * n + rows, mask=row_mask, other=0.0)
    shift -= tl.load(row_max + rows, mask=row_mask, other=0.0)
    norm = tl.load(log_sum + rows, mask=row_mask, other=0.0)
    factor = -total * tl.math.exp2(shift) * tl.math.exp2(-norm)
    at = saved + rows.to(tl.int64)[:, None] * stride + tile * BN + columns[None, :]
    mask = row_mask[:, None] & (columns < width - tile * BN)[None, :]
    dz = tl.load(at, mask=mask, other=0.0).to(tl.float32) * factor[:, None]
    dz = put_selected(
        dz, columns, tile * BN, BN, rows, row_mask, ids, dlogp, logp, total, m, 0.0, 0.0,
        inverse_temperature, SHARED, False, False,
    )  # fmt: skip
    tl.store(at, dz.to(saved.dtype.element_ty), mask=mask)
