"""Shared-prompt attention by a varlen FlashAttention kernel on CUDA.

Query segments [P, R1, ..., RK] attend causally (aligned at the end) to key segments [P, P + R1, ..., P + RK], so keys
and values of a prompt are laid out once for each of its responses. Their gradients are summed over the copies in fp32
and in a fixed order, where an index_add would round every time and depend on the order of atomics. flash-attn's
backward pass is asked to be deterministic; PyTorch's is under ``torch.use_deterministic_algorithms``.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch

from real_fast.attention.layout import Layout

try:  # flash-attn 4's package of that name has no such function
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
HAS_FLASH_ATTN = flash_attn_varlen_func is not None


class VarlenAttention:
    """Attention over one packed row; flash-attn's kernel where it is installed, else PyTorch's ``varlen_attn``.

    Args:
        layout: The row's segments.
        device: A CUDA device.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        length, before = layout.segments[:, 1], layout.segments[:, 3]
        self.max_q, self.max_k = int(length.max()), int((length + before).max())
        self.cu_q = _offsets(length).to(device, non_blocking=True)
        self.cu_k = _offsets(length + before).to(device, non_blocking=True)
        self.copies = KeyCopies(layout, device)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """[1, H, T, Dh] bf16 or fp16 queries over [1, Hkv, T, Dh] keys and values to [1, H, T, Dh]."""
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        out = _varlen(
            q,
            self.copies.spread(k),
            self.copies.spread(v),
            self.cu_q,
            self.cu_k,
            self.max_q,
            self.max_k,
            scale,
            (-1 if window is None else window - 1, 0),
        )
        return out.transpose(0, 1)[None]


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


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: tuple[int, int],
) -> torch.Tensor:
    if flash_attn_varlen_func is not None:
        out: torch.Tensor = flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True, window_size=window, deterministic=True
        )
        return out
    from torch.nn.attention.varlen import varlen_attn

    # Releases before 2.12 take fewer key-value heads as they are and know no such argument.
    options: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if _VARLEN_HAS_GQA else {}
    result: Any = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window, **options)
    return cast(torch.Tensor, result)


def _has_gqa() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


_VARLEN_HAS_GQA = _has_gqa()
