"""What PyTorch has for CUDA alone, computed on the CPU: products with wider results, and FlashAttention by segments.

Arguments are checked as the CUDA code checks them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.attention import plain_flash

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


def _wider(a: torch.Tensor, out_dtype: torch.dtype) -> None:
    if a.dtype != out_dtype and not (a.dtype in HALF and out_dtype == torch.float32):
        raise RuntimeError(f"a product of {a.dtype} has no result in {out_dtype}: float32 of 16 bits alone")


def _same(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dtype != b.dtype:
        raise RuntimeError(f"expected operands of one dtype, and they are {a.dtype} and {b.dtype}")


def _mm(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype, *, out: torch.Tensor | None = None) -> torch.Tensor:
    _same(a, b)
    _wider(a, out_dtype)
    if out is not None and out.dtype != out_dtype:
        raise RuntimeError(f"out is {out.dtype}, and out_dtype {out_dtype}")
    result = torch.mm(a.to(out_dtype), b.to(out_dtype))
    return result if out is None else out.copy_(result)


def _addmm(
    total: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    out_dtype: torch.dtype,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if total.dtype not in (out_dtype, a.dtype):
        raise RuntimeError(f"{total.dtype} is added to a product of {a.dtype} in {out_dtype}")
    result = beta * total.to(out_dtype) + alpha * _mm(a, b, out_dtype)
    return result if out is None else out.copy_(result)


def _check_segments(cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int) -> None:
    for name, offsets, longest in (("q", cu_q, max_q), ("k", cu_k, max_k)):
        if offsets.dtype != torch.int32 or not offsets.is_contiguous():
            raise RuntimeError(f"cu_seqlens_{name} must be int32 and contiguous, and is {offsets.dtype}")
        if int(offsets.diff().max()) > longest:
            raise RuntimeError(f"max_{name} is {longest}, and a segment has {int(offsets.diff().max())}")
    if len(cu_q) != len(cu_k):
        raise RuntimeError(f"{len(cu_q) - 1} segments of queries and {len(cu_k) - 1} of keys")


def _check_states(*states: torch.Tensor) -> None:
    for x in states:
        if x.dtype not in HALF or x.dtype != states[0].dtype:
            raise RuntimeError(f"FlashAttention takes one dtype of 16 bits, and not {[y.dtype for y in states]}")
        if x.stride(-1) != 1:
            raise RuntimeError(f"FlashAttention needs a contiguous last dimension; strides are {x.stride()}")
        if x.shape[-1] % 8 or x.shape[-1] > 256:
            raise RuntimeError(f"FlashAttention takes heads of up to 256, in eights, and not of {x.shape[-1]}")


def _flash(*args: Any, **options: Any) -> tuple[torch.Tensor, ...]:
    _check_states(*args[:3])
    _check_segments(*args[3:7])
    return plain_flash.forward(*args, **options)


def _flash_backward(grad: torch.Tensor, *args: Any, **options: Any) -> tuple[torch.Tensor, ...]:
    _check_states(*args[:3])  # gradient and output are made contiguous first
    _check_segments(*args[5:9])
    if args[4].dtype != torch.float32:
        raise RuntimeError(f"FlashAttention takes a log-sum-exp in float32, not {args[4].dtype}")
    return plain_flash.backward(grad, *args, **options)


CUDA_ONLY: dict[Any, Callable[..., Any]] = {
    aten.mm.dtype: _mm,
    aten.mm.dtype_out: _mm,
    aten.addmm.dtype: _addmm,
    aten.addmm.dtype_out: _addmm,
    aten._flash_attention_forward.default: _flash,
    aten._flash_attention_backward.default: _flash_backward,
}
