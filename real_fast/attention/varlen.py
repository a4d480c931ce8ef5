"""Shared-prompt attention by varlen FlashAttention kernels on CUDA.

Every segment attends to itself causally in one call; in another, all responses of a group, one behind the other, attend
to their prompt without a mask; and the two are merged by their log-sum-exp, so no key is laid out twice. The backward
pass runs the same two calls with the merged output and log-sum-exp, for which a softmax's gradient splits over blocks
of keys, as in ring attention (arXiv 2310.01889).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from real_fast.attention import flash
from real_fast.attention.flash import Pattern, Segments
from real_fast.attention.key_copies import KeyCopies
from real_fast.attention.layout import Layout


class Prompts(NamedTuple):
    """What responses see of the row beside themselves.

    Attributes:
        segments: A group's responses, and its prompt.
        responses: [Tr] int64 on the device, the tokens of all responses.
        prompts: [Tp] int64, those of the prompts that have any.
    """

    segments: Segments
    responses: torch.Tensor
    prompts: torch.Tensor

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> Prompts | None:
        """None for a row without responses."""
        _, length, _, before = layout.segments.unbind(1)
        is_prompt = before == 0
        group = is_prompt.cumsum(0) - 1  # of each segment
        responses = torch.zeros(int(is_prompt.sum()), dtype=torch.int64)
        responses.index_add_(0, group[~is_prompt], length[~is_prompt])
        has_any = responses > 0
        if not bool(has_any.any()):
            return None
        kinds = (~is_prompt, is_prompt & has_any[group])
        # NumPy's: a quarter of the time of torch's on the CPU.
        tokens = (torch.from_numpy(np.repeat(kind.numpy(), length.numpy()).nonzero()[0]) for kind in kinds)
        segments = Segments.of(responses[has_any], length[is_prompt][has_any], device)
        return cls(segments, *(x.to(device, non_blocking=True) for x in tokens))


class VarlenAttention:
    """Attention over one packed row; flash-attn's kernels where it is installed, else PyTorch's.

    Args:
        layout: The row's segments.
        device: A CUDA device.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        length = layout.segments[:, 1]
        self.own = Segments.of(length, length, device)
        self.shared = Prompts.of(layout, device)
        self.longest = layout.longest

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """[1, H, T, Dh] bf16 or fp16 queries over [1, Hkv, T, Dh] keys and values to [1, H, T, Dh]."""
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if window is not None and window < self.longest:
            segments, copies = self.windowed
            k, v = copies.spread(k), copies.spread(v)
            out: torch.Tensor = _Attention.apply(q, k, v, segments, None, Pattern(scale, True, window))
        else:
            out = _Attention.apply(q, k, v, self.own, self.shared, Pattern(scale, True))
        return out.transpose(0, 1)[None]

    @cached_property
    def windowed(self) -> tuple[Segments, KeyCopies]:
        """For windows that cut into a prompt; built for the first layer that has one."""
        length, before = self.layout.segments[:, 1], self.layout.segments[:, 3]
        return Segments.of(length, length + before, self.device), KeyCopies(self.layout, self.device)


class _Attention(torch.autograd.Function):
    """[T, H, Dh] of each segment over its own keys, and of responses over those of their prompts."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        own: Segments,
        shared: Prompts | None,
        pattern: Pattern,
    ) -> torch.Tensor:
        out, lse = flash.forward(q, k, v, own, pattern)
        if shared is not None:
            rows, tokens = shared.responses, shared.prompts
            whole = Pattern(pattern.scale, False)
            there = (q.index_select(0, rows), k.index_select(0, tokens), v.index_select(0, tokens))
            other, other_lse = flash.forward(*there, shared.segments, whole)
            mine_lse = lse.index_select(1, rows)
            total = torch.logaddexp(mine_lse, other_lse)
            # In place, and in the products' own precision: a copy in fp32 would be the largest tensor of the layer.
            mine = out.index_select(0, rows).mul_(_share(mine_lse, total)).addcmul_(other, _share(other_lse, total))
            out.index_copy_(0, rows, mine)
            lse.index_copy_(1, rows, total)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.own, ctx.shared, ctx.pattern = own, shared, pattern
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        own, shared, pattern = ctx.own, ctx.shared, ctx.pattern
        grad = grad.contiguous()
        dq, dk, dv = flash.backward(grad, q, k, v, out, lse, own, pattern)
        if shared is not None:
            rows, tokens = shared.responses, shared.prompts
            g, some_q, some_out = (x.index_select(0, rows) for x in (grad, q, out))
            some_k, some_v = (x.index_select(0, tokens) for x in (k, v))
            given = (g, some_q, some_k, some_v, some_out, lse.index_select(1, rows))
            parts = flash.backward(*given, shared.segments, Pattern(pattern.scale, False))
            for total, at, part in zip((dq, dk, dv), (rows, tokens, tokens), parts, strict=True):
                # Each place once, so nothing depends on an order of atomics, as in an index_add of 16-bit numbers.
                total.index_copy_(0, at, part.add_(total.index_select(0, at)))
        return dq, dk, dv, None, None, None


def _share(part: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """[T, H, 1] of a part's weight in the whole softmax, from log-sum-exps [H, T]."""
    return (part - total).exp().t().unsqueeze(-1)
