"""PyTorch's varlen FlashAttention operators on the CPU, by plain products, to call them as they are."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise

import torch


def _masked(q, k, scale, left, right):
    """[H, n, m] scores of one segment; queries and keys are aligned at their ends."""
    n, m = q.shape[0], k.shape[0]
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    distance = torch.arange(m - n, m)[:, None] - torch.arange(m)[None]
    seen = torch.ones(n, m, dtype=torch.bool)
    if left >= 0:
        seen &= distance <= left
    if right >= 0:
        seen &= -distance <= right
    return scores.masked_fill(~seen, float("-inf"))


def _segments(q, k, v, cu_q, cu_k):
    """Each segment's places and its [n, H, Dh] tensors, a key head for every query head."""
    times = q.shape[1] // k.shape[1]
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v)]
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        yield slice(a, b), slice(c, d), wide[0][a:b], *(x[c:d].repeat_interleave(times, 1) for x in wide[1:])


@contextmanager
def plain_flash():
    """Puts them in place; gives a list of (queries, keys) of every call."""
    calls = []

    def sides(causal, left, right):
        return (-1 if left is None else left), 0 if causal else (-1 if right is None else right)

    def forward(
        q,
        k,
        v,
        cu_q,
        cu_k,
        max_q,
        max_k,
        dropout,
        causal,
        debug,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
        **unknown,
    ):
        assert not dropout and not debug and not any(unknown.values()) and cu_q.dtype == cu_k.dtype == torch.int32
        assert max_q == int(cu_q.diff().max()) and max_k == int(cu_k.diff().max())
        assert int(cu_q[-1]) == len(q) and int(cu_k[-1]) == len(k) == len(v)
        calls.append((len(q), len(k)))
        wide = torch.promote_types(q.dtype, torch.float32)
        out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[1], len(q), dtype=wide)
        for at, _, some_q, some_k, some_v in _segments(q, k, v, cu_q, cu_k):
            scores = _masked(some_q, some_k, scale, *sides(causal, window_size_left, window_size_right))
            lse[:, at] = scores.logsumexp(2)
            out[at] = torch.einsum("hqk,khd->qhd", scores.softmax(2), some_v).to(q.dtype)
        return out, lse, torch.zeros(2), torch.zeros(0), torch.zeros(0)

    def backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        cu_q,
        cu_k,
        max_q,
        max_k,
        dropout,
        causal,
        state,
        unused,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
    ):
        assert not dropout and lse.is_contiguous() and lse.shape == (q.shape[1], len(q)) and out.shape == q.shape
        calls.append((len(q), len(k)))
        wide, groups = lse.dtype, (k.shape[1], q.shape[1] // k.shape[1])
        dq, dk, dv = (torch.zeros(x.shape, dtype=wide) for x in (q, k, v))
        for at, keys, some_q, some_k, some_v in _segments(q, k, v, cu_q, cu_k):
            g, o = grad[at].to(wide), out[at].to(wide)
            scores = _masked(some_q, some_k, scale, *sides(causal, window_size_left, window_size_right))
            p = (scores - lse[:, at, None]).exp()
            ds = p * (torch.einsum("qhd,khd->hqk", g, some_v) - (g * o).sum(2).t()[:, :, None])
            dq[at] = torch.einsum("hqk,khd->qhd", ds, some_k) * scale
            dk[keys] = (torch.einsum("hqk,qhd->khd", ds, some_q) * scale).unflatten(1, groups).sum(2)
            dv[keys] = torch.einsum("hqk,qhd->khd", p, g).unflatten(1, groups).sum(2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield calls
