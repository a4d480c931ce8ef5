"""Triton: exponentials relative to one base per row, which need no pass that makes dL/dz of them.

With a base b known before the GEMM and E_v = exp(z_v - b), a row with the one target t and dlogp = dL/dlogp has

    dL/dz_v = c E_v,  c = -dlogp exp(b - lse) / temperature

for all v but t, where E_t = expm1(logp) exp(lse - b) makes it so too. The factor c is the row's alone: it goes to the
rows of dX behind their product, and to a copy of the hidden states in front of dW's. So the [n, V] exponentials, which
the GEMM stores, are what is multiplied, and are not read and written once more in between.

The base is the target's own logit, hence never above the log-sum-exp, and any number near it would do. Where a tile of
the GEMM has a logit more than FAR bits above it (a target of p < 1e-12), that tile's exponentials are relative to its
maximum less FAR; such a row is brought to one base by a pass over that row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from real_kernels.triton_gemm import LOG2_E, UNALIGNED, expm1


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=UNALIGNED)
def base_kernel(
    h,  # [n, D]
    w,  # [V, D]
    bias,  # [V]
    ids,  # [n]
    row_base,  # [n] float32, bits
    n,
    D,
    V,
    stride_h,
    stride_w,
    inverse_temperature,
    BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The logit of each row's target, in bits; 0 for an id outside the vocabulary. Grid: row blocks."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = rows < n
    token = tl.load(ids + rows, mask=row_mask, other=-1)
    known = (token >= 0) & (token < V)
    depth = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for k in range(0, D, BLOCK_D):
        mask = known[:, None] & (depth < D - k)[None, :]
        a = tl.load(h + rows.to(tl.int64)[:, None] * stride_h + k + depth[None, :], mask=mask, other=0.0)
        b = tl.load(w + token[:, None] * stride_w + k + depth[None, :], mask=mask, other=0.0)
        total += a.to(tl.float32) * b.to(tl.float32)
    z = tl.sum(total, 1)
    if BIAS:
        z += tl.load(bias + token, mask=known, other=0.0).to(tl.float32)
    tl.store(row_base + rows, z * (inverse_temperature * LOG2_E), mask=row_mask)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=UNALIGNED)
def common_base_kernel(
    saved,  # [n, V] exp(z - tile_max), changed to E
    ids,  # [n]
    tile_max,  # [tiles, n], bits
    row_base,  # [n], bits
    row_max,  # [n], bits: the row's base from here on
    log_sum,  # [n], bits
    dlogp,  # [n]
    logp,  # [n], nats
    factor,  # [n] c
    n,
    tiles,
    width,  # of a row, the padding included
    stride,
    inverse_temperature,
    BLOCK_ROWS: tl.constexpr,
    BN: tl.constexpr,
):
    """In place: the targets' columns, and rows with tiles that are not relative to the row's base. And c of each row.

    Grid: (row blocks, programs that share a row block's tiles).
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    part, parts = tl.program_id(1), tl.num_programs(1)
    row_mask = rows < n
    base = tl.load(row_max + rows, mask=row_mask, other=0.0)
    norm = tl.load(log_sum + rows, mask=row_mask, other=0.0)
    if part == 0:
        u = tl.load(dlogp + rows, mask=row_mask, other=0.0)
        tl.store(factor + rows, -u * inverse_temperature * tl.math.exp2(-norm), mask=row_mask)
    start = saved + rows.to(tl.int64) * stride
    token = tl.load(ids + rows, mask=row_mask, other=-1).to(tl.int32)
    far = row_mask & (base > tl.load(row_base + rows, mask=row_mask, other=0.0))
    if tl.max(far.to(tl.int32), 0) > 0:
        columns = tl.arange(0, BN)
        for tile in range(part, tiles, parts):
            shift = tl.load(tile_max + tile * n + rows, mask=far, other=0.0) - base
            # The target's column is written below, by whichever thread.
            mask = far[:, None] & (columns < width - tile * BN)[None, :]
            mask &= columns[None, :] != (token - tile * BN)[:, None]
            at = start[:, None] + tile * BN + columns[None, :]
            e = tl.load(at, mask=mask, other=0.0).to(tl.float32) * tl.math.exp2(shift)[:, None]
            tl.store(at, e.to(saved.dtype.element_ty), mask=mask)
    if part == 0:
        value = expm1(tl.load(logp + rows, mask=row_mask, other=0.0)) * tl.math.exp2(norm)
        here = row_mask & (token >= 0) & (token < width)
        tl.store(start + token, value.to(saved.dtype.element_ty), mask=here)
