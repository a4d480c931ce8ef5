"""A prompt's keys once for each of its responses, for a window that cuts into a prompt.

Where such a window begins, every query of a response has its own answer, so each response needs key segments of its
own, [P, P + R1, ..., P + RK]. Their gradients are summed over the copies in fp32 and in a fixed order, where an
index_add would round every time and depend on the order of atomics.
"""

from __future__ import annotations

from typing import Any

import torch

from real_fast.attention.layout import Layout


class KeyCopies:
    """Lays out keys or values as [P, P + R1, ..., P + RK], and sums gradients back.

    Args:
        layout: The row's segments.
        device: Device of the index tensors.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        start, length, prompt, before = layout.segments.unbind(1)
        total = length + before
        first = total.cumsum(0) - total  # of each segment's keys
        within = torch.arange(int(total.sum())) - torch.repeat_interleave(first, total)
        b, s, p = (torch.repeat_interleave(x, total) for x in (before, start, prompt))
        #: for every key that the kernel sees, the token it belongs to
        self.source = torch.where(within < b, p + within, s + within - b)
        #: for every token, where its own segment's copy lies
        self.own = torch.empty(layout.tokens, dtype=torch.int64)
        self.own[self.source[within >= b]] = (within >= b).nonzero()[:, 0]
        # The other copies of each prompt token, padded with a row of zeros behind the last.
        is_copy = within < b
        tokens, order = self.source[is_copy].sort(stable=True)
        places = is_copy.nonzero()[:, 0][order]
        self.shared, counts = tokens.unique_consecutive(return_counts=True)
        column = torch.arange(len(tokens)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        width = int(counts.max()) if len(counts) else 0
        #: whether prompts have different numbers of responses, so that a row of zeros is needed behind the last
        self.ragged = bool(len(counts)) and int(counts.min()) < width
        self.others = torch.full((len(self.shared), width), len(self.source))
        self.others[torch.repeat_interleave(torch.arange(len(counts)), counts), column] = places
        for name in ("source", "own", "shared", "others"):
            setattr(self, name, getattr(self, name).to(device, non_blocking=True))

    def spread(self, states: torch.Tensor) -> torch.Tensor:
        """[T, Hkv, Dh] to [sum of key segments, Hkv, Dh]."""
        out: torch.Tensor = _Spread.apply(states, self.ragged, self.source, self.own, self.shared, self.others)
        return out


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, ragged: bool, source: torch.Tensor, *indices: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*indices)
        ctx.ragged = ragged
        return states.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        own, shared, others = ctx.saved_tensors
        out = grad.index_select(0, own)
        padded = torch.cat([grad, torch.zeros_like(grad[:1])]) if ctx.ragged else grad
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        total = grad.index_select(0, own.index_select(0, shared)).to(wide)
        for column in others.unbind(1):  # at most K, one at a time: nothing of size [tokens, K] is made
            total += padded.index_select(0, column)
        out.index_copy_(0, shared, total.to(grad.dtype))
        return out, None, None, None, None, None
