"""Triton: one GEMM, hidden states times lm_head, whose epilogue never lets the logits reach memory.

The epilogue works on the tile's float32 accumulator. It writes, per row and tile of the vocabulary, the maximum and the
sum of exponentials (an online log-sum-exp in two steps, without atomics, hence deterministic), the logits of the
selected tokens, and by STORE:

- 0: nothing else (forward pass of the recomputing head);
- 1: exp(z - tile maximum) in the weight's dtype, which :mod:`real_kernels.triton_rows` turns into dL/dz in place;
  with BASE, exp(z - base of the row), see :mod:`real_kernels.triton_base`;
- 2: dL/dz itself, the log-sum-exp being known (backward pass of the recomputing head).

Maxima and log-sum-exps in memory are in bits (base 2) and divided by the temperature: the hardware's exponential is
exp2, so that exp(z / temperature - maximum) is one multiply-add, rounded once, and one instruction more.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Small tensors that start anywhere, and counts that differ from call to call: each combination of what they happen to
# be divisible by would be compiled anew.
UNALIGNED = [
    "tile_max", "tile_sum", "tile_ez", "selected", "row_base", "row_max", "log_sum", "dlogp", "logp", "entropy", "ids",
    "factor",
]  # fmt: skip


# Bits in a nat, and nats in a bit.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Bits that a logit may be above its row's base: exponentials up to 2^40, and sums of them up to 2^58 in a vocabulary of
# 2^18. Their inverse times a hidden state is far from float32's (and bfloat16's) smallest number, 2^-126.
FAR = tl.constexpr(40.0)


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, without cancellation near 0."""
    # Taylor's series up to x^8: its remainder is below float32's rounding for x > -1/2.
    tail = 1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))
    near = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * tail)))
    return tl.where(x > -0.5, near, tl.exp(x) - 1)


@triton.jit
def sum_of_dlogp(dlogp, rows, row_mask, m, SHARED: tl.constexpr):
    """U = sum_k dlogp_k of each row."""
    if SHARED:
        total = tl.zeros_like(rows).to(tl.float32)
        for k in range(m):
            total += tl.load(dlogp + rows * m + k, mask=row_mask, other=0.0)
    else:
        total = tl.load(dlogp + rows, mask=row_mask, other=0.0)
    return total


@triton.jit
def cap_slope(l_k, lse, ratio, CAP: tl.constexpr):
    """Derivative of the soft-cap at a selected token, whose logit is its log-probability plus `lse`, in bits."""
    if CAP:
        t = (l_k + lse * LN_2) * ratio
        return 1 - t * t
    else:
        return 1.0


@triton.jit
def put_selected(
    dz,
    columns,
    first,
    width,
    rows,
    row_mask,
    ids,
    dlogp,
    logp,
    total,
    m,
    lse,
    ratio,
    factor,
    SHARED: tl.constexpr,
    CAP: tl.constexpr,
    BRANCHES: tl.constexpr,
):
    """Overwrite the selected tokens' columns: factor (-dlogp_k expm1(l_k) - p_k sum_{j != k} dlogp_j), in float32.

    `columns` are 0..width-1, counted from the tile's first; `total` is factor times the sum of dlogp, `lse` in bits,
    `ratio` temperature / cap.
    """
    if SHARED:
        for k in range(m):
            token = tl.load(ids + k).to(tl.int32) - first
            if (token >= 0) & (token < width):
                dlogp_k = tl.load(dlogp + rows * m + k, mask=row_mask, other=0.0) * factor
                l_k = tl.load(logp + rows * m + k, mask=row_mask, other=0.0)
                value = -dlogp_k * expm1(l_k) - tl.exp(l_k) * (total - dlogp_k)
                value *= cap_slope(l_k, lse, ratio, CAP)
                dz = tl.where((columns == token)[None, :], value[:, None], dz)
    else:
        token = tl.load(ids + rows, mask=row_mask, other=0).to(tl.int32) - first
        here = row_mask & (token >= 0) & (token < width)
        found = tl.max(here.to(tl.int32), 0) if BRANCHES else 1
        if found > 0:
            l_t = tl.load(logp + rows, mask=row_mask, other=0.0)
            value = -total * expm1(l_t) * cap_slope(l_t, lse, ratio, CAP)
            dz = tl.where(columns[None, :] == token[:, None], value[:, None], dz)
    return dz


@triton.jit
def tile_at(number, n, columns, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile, by its number: GROUP row tiles go through the columns together, for reuse in L2."""
    row_tiles = tl.cdiv(n, BM)
    column_tiles = tl.cdiv(columns, BN)
    per_group = GROUP * column_tiles
    group = number // per_group
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    return group * GROUP + (number % per_group) % height, (number % per_group) // height


@triton.jit
def store_target(selected, z, columns, ids, rows, row_mask, first, left, BN: tl.constexpr, BRANCHES: tl.constexpr):
    """The logits of the targets that are in a tile, which begins at column `first` and of which `left` columns are."""
    token = tl.load(ids + rows, mask=row_mask, other=0).to(tl.int32) - first
    here = row_mask & (token >= 0) & (token < tl.minimum(BN, left))
    found = tl.max(here.to(tl.int32), 0) if BRANCHES else 1
    if found > 0:
        z_t = tl.sum(tl.where(columns[None, :] == token[:, None], z, 0.0), 1)
        tl.store(selected + rows, z_t, mask=here)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=UNALIGNED)
def logits_kernel(
    h,  # [n, D], or its descriptor
    w,  # [V, D], or its descriptor
    bias,  # [V]
    ids,  # [n] targets, or [m] tokens that all rows share
    tile_max,  # [tiles, n] float32, bits: what the tile's exponentials are relative to
    tile_sum,  # [tiles, n] float32
    tile_ez,  # [tiles, n] float32: sum of exp(z - max) (z - max), in bits, for the entropy
    selected,  # [n, m] float32 logits, before the temperature
    row_base,  # [n] float32, bits
    row_max,  # [n] float32, bits
    log_sum,  # [n] float32, bits
    dlogp,  # [n, m] float32
    logp,  # [n, m] float32
    out,  # [n, columns], by STORE
    n,
    D,
    first,  # the columns are first..last-1
    last,
    m,
    stride_h,
    stride_w,
    stride_out,
    width,  # of a row of `out`, the padding included: what is written there is nobody's, and not read
    inverse_temperature,
    cap,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_D: tl.constexpr,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    SHARED: tl.constexpr,
    ENTROPY: tl.constexpr,
    STORE: tl.constexpr,
    BASE: tl.constexpr,  # exponentials relative to the row's base, where it is not too far below the tile's maximum
    BRANCHES: tl.constexpr,  # around what few tiles need: targets, and columns past the vocabulary's end
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # for Triton's interpreter, whose dot knows no bfloat16; exact
):
    """Grid: one program per tile of rows and columns, in groups of GROUP row tiles."""
    row_tile, column_tile = tile_at(tl.program_id(0), n, last - first, BM, BN, GROUP)
    row0 = row_tile * BM
    column0 = first + column_tile * BN
    rows = row0 + tl.arange(0, BM)
    # Counted from the tile's first column: 64-odd numbers a thread then are constants instead of registers.
    columns = tl.arange(0, BN)
    row_mask = rows < n
    inside = columns < last - column0

    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if DESCRIPTORS:
        for k in range(0, D, BK):
            a = h.load([row0, k])
            b = w.load([column0, k])
            if WIDEN:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    else:
        depth = tl.arange(0, BK)
        # Rows and columns past the end read the last one: their results are masked below.
        a_at = h + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * stride_h + depth[None, :]
        b_at = w + tl.minimum(column0 + columns, last - 1).to(tl.int64)[None, :] * stride_w + depth[:, None]
        for k in range(0, D, BK):
            if EVEN_D:
                a = tl.load(a_at)
                b = tl.load(b_at)
            else:
                a = tl.load(a_at, mask=(depth < D - k)[None, :], other=0.0)
                b = tl.load(b_at, mask=(depth < D - k)[:, None], other=0.0)
            if WIDEN:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            a_at += BK
            b_at += BK

    z = acc
    if BIAS:
        z += tl.load(bias + column0 + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if CAP:
        # tanh by exp(-2|x|), which cannot overflow; the factor is one number, so that no element is divided by the cap.
        e = tl.math.exp2(tl.abs(z) * (-2 * LOG2_E / cap))
        t = (1 - e) / (1 + e)
        z = tl.where(z < 0, -t, t) * cap
    # From logits to bits at this temperature.
    bits = inverse_temperature * LOG2_E
    # What is past the vocabulary's end, in its last tile, has no probability and no gradient.
    left = last - column0 if BRANCHES else 0
    if STORE == 2:
        if left < BN:
            z = tl.where(inside[None, :], z, float("-inf"))
        peak = tl.load(row_max + rows, mask=row_mask, other=0.0)
        norm = tl.load(log_sum + rows, mask=row_mask, other=0.0)
        total = sum_of_dlogp(dlogp, rows, row_mask, m, SHARED) * inverse_temperature
        # The sum as a factor: of a difference of three, the smallest would lose its digits where logits are large.
        value = tl.math.exp2(z * bits - peak[:, None]) * (-total * tl.math.exp2(-norm))[:, None]
        ratio = 1 / (cap * inverse_temperature)
        if CAP:
            value *= 1 - t * t
        # After the slope, which would have to wait in registers for what the selected columns branch on.
        value = put_selected(
            value, columns, column0, BN, rows, row_mask, ids, dlogp, logp, total, m, peak + norm, ratio,
            inverse_temperature, SHARED, CAP, BRANCHES,
        )  # fmt: skip
    else:
        if SHARED:
            for k in range(m):
                token = tl.load(ids + k).to(tl.int32) - column0
                if (token >= 0) & (token < tl.minimum(BN, last - column0)):
                    z_k = tl.sum(tl.where((columns == token)[None, :], z, 0.0), 1)
                    tl.store(selected + rows * m + k, z_k, mask=row_mask)
        else:
            store_target(selected, z, columns, ids, rows, row_mask, column0, last - column0, BN, BRANCHES)
        if left < BN:
            z = tl.where(inside[None, :], z, float("-inf"))
        peak = tl.max(z, 1) * bits
        if BASE:
            peak = tl.maximum(tl.load(row_base + rows, mask=row_mask, other=0.0), peak - FAR)
        if BASE and not BIAS:  # finite, and no second number per row to hold
            z = z * bits - peak[:, None]
        else:
            # A tile whose logits are all -inf (a bias that masks tokens) adds nothing, and must not make NaN.
            base = tl.where(peak == float("-inf"), 0.0, peak)
            z = z * bits - base[:, None]
        value = tl.math.exp2(z)
        part = column_tile.to(tl.int64) * n + rows
        tl.store(tile_max + part, peak, mask=row_mask)
        tl.store(tile_sum + part, tl.sum(value, 1), mask=row_mask)
        if ENTROPY:
            tl.store(tile_ez + part, tl.sum(tl.where(value > 0, value * z, 0.0), 1), mask=row_mask)
    if STORE > 0:
        at = out + rows.to(tl.int64)[:, None] * stride_out + (column0 - first) + columns[None, :]
        in_row = columns < width - (column0 - first)
        tl.store(at, value.to(out.dtype.element_ty), mask=row_mask[:, None] & in_row[None, :])
