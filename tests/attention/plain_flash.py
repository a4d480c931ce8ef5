"""PyTorch's varlen FlashAttention operators on the CPU, by plain products, and a way to call them as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    debug: bool = False,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, ...]:
    """``aten._flash_attention_forward``: [n, H, Dh] of [n, H, Dh] queries and [m, Hkv, Dh] keys and values.

    Sums are float32 (float64 for float64). Of what it gives beside the output, the log-sum-exps [H, n] alone are real.
    """
    if dropout or debug or any(x is not None for x in others.values()):
        raise NotImplementedError(f"dropout {dropout}, debug {debug}, {others}")
    out = torch.empty_like(q)
    logsumexp = torch.empty(q.shape[1], len(q), dtype=torch.promote_types(q.dtype, torch.float32))
    for at, _, some_q, some_k, some_v in _segments(q, k, v, cu_q, cu_k):
        scores, _ = _scores(some_q, some_k, causal, scale, window_size_left, window_size_right)
        logsumexp[:, at] = scores.logsumexp(-1)
        out[at] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), some_v).to(q.dtype)
    nothing = torch.zeros(2, dtype=torch.uint64)
    return out, logsumexp, nothing, nothing[0], q.new_empty(0)


def backward(
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
    """``aten._flash_attention_backward``, by the formula: P = exp(S - log-sum-exp), dS = P (dP - sum(grad out)).

    Output and log-sum-exps may be of more keys than are here.
    """
    if dropout or logsumexp.shape != (q.shape[1], len(q)):
        raise RuntimeError(f"dropout {dropout}; log-sum-exps must be [heads, tokens], not {list(logsumexp.shape)}")
    wide, groups = logsumexp.dtype, (k.shape[1], -1)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide) for x in (q, k, v))
    for at, keys, some_q, some_k, some_v in _segments(q, k, v, cu_q, cu_k):
        upstream, result = grad[at].to(wide), out[at].to(wide)
        scores, factor = _scores(some_q, some_k, causal, scale, window_size_left, window_size_right)
        p = (scores - logsumexp[:, at, None]).exp()
        dp = torch.einsum("nhd,mhd->hnm", upstream, some_v)
        ds = p * (dp - (upstream * result).sum(-1).t()[:, :, None]) * factor
        dq[at] = torch.einsum("hnm,mhd->nhd", ds, some_k)
        dk[keys] = torch.einsum("hnm,nhd->mhd", ds, some_q).unflatten(1, groups).sum(2)
        dv[keys] = torch.einsum("hnm,nhd->mhd", p, upstream).unflatten(1, groups).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@contextmanager
def plain_flash() -> Iterator[list[tuple[int, int]]]:
    """Puts them in place of PyTorch's; gives a list of (queries, keys) of every call."""
    calls = []

    def checked(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: Any, cu_k: Any, max_q: int, max_k: int
    ) -> None:
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert max_q == int(cu_q.diff().max()) and max_k == int(cu_k.diff().max())
        assert int(cu_q[-1]) == len(q) and int(cu_k[-1]) == len(k) == len(v)
        calls.append((len(q), len(k)))

    def noted_forward(*args: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        checked(*args[:7])
        return forward(*args, **options)

    def noted_backward(grad: torch.Tensor, *args: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        checked(*args[:3], *args[5:9])
        assert args[4].is_contiguous() and args[3].shape == args[0].shape
        return backward(grad, *args, **options)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", noted_forward, "CPU")
        library.impl("_flash_attention_backward", noted_backward, "CPU")
        yield calls


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


def _segments(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor
) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Places and [n, H, Dh] tensors of each, float32 or wider, with a head of keys for every head of queries."""
    times, wide = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        keys, values = (x[c:d].to(wide).repeat_interleave(times, 1) for x in (k, v))
        yield slice(a, b), slice(c, d), q[a:b].to(wide), keys, values
