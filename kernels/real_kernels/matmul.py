"""Matrix products with float32 results, whatever the operands' dtype: what the head's exactness rests on."""

from __future__ import annotations

import torch

HALF = (torch.float16, torch.bfloat16)
# Of a sum that is added to on the CPU.
ROWS_AT_ONCE = 4096


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand(x: torch.Tensor) -> torch.Tensor:
    """CPU matrix products round 16-bit results to 16 bits, so 16-bit operands are widened there (exactly).

    Where the CPU multiplies fast in bfloat16, :mod:`real_kernels.bf16_head` does without.
    """
    return x.float() if x.dtype in HALF and not x.is_cuda else x


def mm_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Write a @ b into `out` and return it; sums are float32 (float64) whatever the dtypes.

    On the CPU the result of 16-bit operands is rounded to 16 bits once, whatever `out` is.
    """
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda and a.dtype in HALF:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a @ b)


def mm_exactly(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """As :func:`mm_into`, for sums so long that cuBLAS may split them, and add the parts in 16 bits if `out` has 16."""
    if a.is_cuda and a.dtype in HALF:
        return out.copy_(torch.mm(a, b, out_dtype=torch.float32))
    return mm_into(out, a, b)


def mm_scaled(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """out = factor[:, None] * (a @ b), product and multiplication in float32 (float64), rounded once at the end."""
    wide = a.is_cuda and a.dtype in HALF
    product = torch.mm(a, b, out_dtype=torch.float32) if wide else torch.mm(a, b)
    return torch.mul(product, factor[:, None], out=out)


def addmm_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b in place, total being float32 (float64): no temporary of its size."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        # The very same object as input and output: cuBLAS then adds in place.
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        for start in range(0, total.shape[0], ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            total[part].add_(a[part] @ b)  # not +=, which would copy the sum onto itself
