"""What PyTorch has for CUDA alone, computed on the CPU: products with wider results, and FlashAttention by segments.

Arguments are checked as the CUDA code checks them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

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


def _scores(
    q: torch.Tensor, k: torch.Tensor, causal: bool, scale: float | None, left: int | None, right: int | None
) -> tuple[torch.Tensor, float]:
    """[H, n, m] of [n, H, Dh] queries, aligned with the end of [m, H, Dh] keys; and the scale of the scores."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
    seen = torch.ones_like(distance, dtype=torch.bool)
    right = 0 if causal else right
    if right is not None and right >= 0:
        seen &= distance >= -right
    if left is not None and left >= 0:
        seen &= distance <= left
    scores = torch.einsum("nhd,mhd->hnm", q, k) * scale
    return scores.masked_fill(~seen, float("-inf")), scale


def _wide(x: torch.Tensor, heads: int) -> torch.Tensor:
    """float32, with the keys' (or values') heads repeated for the query heads that share them."""
    return x.float().repeat_interleave(heads // x.shape[1], dim=1)


def _segments(cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int) -> list[tuple[slice, slice]]:
    for name, offsets, longest in (("q", cu_q, max_q), ("k", cu_k, max_k)):
        if offsets.dtype != torch.int32 or not offsets.is_contiguous():
            raise RuntimeError(f"cu_seqlens_{name} must be int32 and contiguous, and is {offsets.dtype}")
        if int(offsets.diff().max()) > longest:
            raise RuntimeError(f"max_{name} is {longest}, and a segment has {int(offsets.diff().max())}")
    q, k = cu_q.tolist(), cu_k.tolist()
    if len(q) != len(k):
        raise RuntimeError(f"{len(q) - 1} segments of queries and {len(k) - 1} of keys")
    return [(slice(*a), slice(*b)) for a, b in zip(pairwise(q), pairwise(k), strict=True)]


def _check_states(*states: torch.Tensor) -> None:
    for x in states:
        if x.dtype not in HALF or x.dtype != states[0].dtype:
            raise RuntimeError(f"FlashAttention takes one dtype of 16 bits, and not {[y.dtype for y in states]}")
        if x.stride(-1) != 1:
            raise RuntimeError(f"FlashAttention needs a contiguous last dimension; strides are {x.stride()}")
        if x.shape[-1] % 8 or x.shape[-1] > 256:
            raise RuntimeError(f"FlashAttention takes heads of up to 256, in eights, and not of {x.shape[-1]}")


def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, ...]:
    if dropout or any(x is not None for x in others.values()):
        raise NotImplementedError(f"dropout {dropout}, {others}")
    _check_states(q, k, v)
    out, logsumexp = torch.empty_like(q), q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)
    for a, b in _segments(cu_q, cu_k, max_q, max_k):
        keys, values = _wide(k[b], q.shape[1]), _wide(v[b], q.shape[1])
        scores, _ = _scores(q[a].float(), keys, causal, scale, window_size_left, window_size_right)
        logsumexp[:, a] = scores.logsumexp(-1)
        out[a] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), values).to(out.dtype)
    nothing = torch.zeros(2, dtype=torch.uint64)
    return out, logsumexp, nothing, nothing[0], q.new_empty(0)


def _flash_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    *_: Any,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[torch.Tensor, ...]:
    _check_states(q, k, v)  # the other two are made contiguous first
    if logsumexp.dtype != torch.float32 or logsumexp.shape != (q.shape[1], q.shape[0]):
        raise RuntimeError(f"FlashAttention takes a log-sum-exp [heads, tokens] in float32, not {logsumexp.shape}")
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    heads = q.shape[1]
    for a, b in _segments(cu_q, cu_k, max_q, max_k):
        # By the formula: P = exp(S - log-sum-exp), dS = P (dP - sum(grad out)); both may be of more keys than are here.
        queries, keys, values, upstream = q[a].float(), _wide(k[b], heads), _wide(v[b], heads), grad[a].float()
        scores, factor = _scores(queries, keys, causal, scale, window_size_left, window_size_right)
        p = (scores - logsumexp[:, a, None]).exp()
        dp = torch.einsum("nhd,mhd->hnm", upstream, values)
        ds = p * (dp - (upstream * out[a].float()).sum(-1).t()[:, :, None]) * factor
        dq[a] = torch.einsum("hnm,mhd->nhd", ds, keys).to(q.dtype)
        for total, x in (
            (dk, torch.einsum("hnm,nhd->mhd", ds, queries)),
            (dv, torch.einsum("hnm,nhd->mhd", p, upstream)),
        ):
            total[b] = x.unflatten(1, (total.shape[1], -1)).sum(2).to(total.dtype)
    return dq, dk, dv


CUDA_ONLY: dict[Any, Callable[..., Any]] = {
    aten.mm.dtype: _mm,
    aten.mm.dtype_out: _mm,
    aten.addmm.dtype: _addmm,
    aten.addmm.dtype_out: _addmm,
    aten._flash_attention_forward.default: _flash,
    aten._flash_attention_backward.default: _flash_backward,
}
