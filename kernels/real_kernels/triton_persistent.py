"""Triton: the GEMM whose programs stay, for exponentials that are kept relative to a base per row.

:func:`real_kernels.triton_gemm.logits_kernel` has a program per tile, whose tensor cores wait while its epilogue
computes and stores. Here a program per multiprocessor goes from tile to tile. The loops over tiles and over D are made
one, so that the next tile's first operands are fetched during this one's epilogue, and exponentials leave by the bulk
copy engine (TMA), half a tile at a time, while the program goes on.

For plain bfloat16 rows on sm_90: a target each, no bias, no soft-cap, no entropy, rows that descriptors can fetch. Its
gain is predicted and not measured; so no default tile asks for it (``Tile.persistent``), but one of those that
REAL_KERNELS_AUTOTUNE=1 times does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from real_kernels.triton_gemm import FAR, LOG2_E, UNALIGNED, store_target, tile_at


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=UNALIGNED)
def persistent_kernel(
    h,  # descriptor of [n, D]
    w,  # descriptor of [V, D]
    ids,  # [n]
    tile_max,  # [tiles, n] float32, bits: what the tile's exponentials are relative to
    tile_sum,  # [tiles, n] float32
    selected,  # [n] float32 logits, before the temperature
    row_base,  # [n] float32, bits
    out,  # descriptor of [n, V], in blocks of half a tile
    n,
    D,
    V,
    inverse_temperature,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    WIDEN: tl.constexpr,  # for Triton's interpreter, whose dot knows no bfloat16; exact
):
    """Grid: as many programs as there are multiprocessors, or tiles if these are fewer."""
    bits = inverse_temperature * LOG2_E
    for tile in tl.range(tl.program_id(0), tl.cdiv(n, BM) * tl.cdiv(V, BN), tl.num_programs(0), flatten=True):
        row_tile, column_tile = tile_at(tile, n, V, BM, BN, GROUP)
        row0 = row_tile * BM
        column0 = column_tile * BN

        z = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, D, BK):
            a = h.load([row0, k])
            b = w.load([column0, k])
            if WIDEN:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            z = tl.dot(a, b.T, z)

        rows = row0 + tl.arange(0, BM)
        columns = tl.arange(0, BN)
        row_mask = rows < n
        store_target(selected, z, columns, ids, rows, row_mask, column0, V - column0, BN, True)
        if V - column0 < BN:
            z = tl.where((columns < V - column0)[None, :], z, float("-inf"))
        base = tl.maximum(tl.load(row_base + rows, mask=row_mask, other=0.0), tl.max(z, 1) * bits - FAR)
        # Two halves, so that the second one's exponentials are computed while the first one is on its way.
        left, right = tl.split(tl.permute(tl.reshape(z, (BM, 2, BN // 2)), (0, 2, 1)))
        left = tl.math.exp2(left * bits - base[:, None])
        out.store([row0, column0], left.to(out.dtype))
        right = tl.math.exp2(right * bits - base[:, None])
        out.store([row0, column0 + BN // 2], right.to(out.dtype))
        part = column_tile.to(tl.int64) * n + rows
        tl.store(tile_max + part, base, mask=row_mask)
        tl.store(tile_sum + part, tl.sum(left, 1) + tl.sum(right, 1), mask=row_mask)
