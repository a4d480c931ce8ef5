"""Varlen FlashAttention kernels on CUDA, forward and backward apart: flash-attn's if installed, else PyTorch's.

Both are FlashAttention 2 (arXiv 2307.08691). The public functions give the log-sum-exp, and no gradient flows back
through it, which what is merged of several calls needs. The backward kernels themselves take any output and log-sum-exp
to go with them, those of the merged softmax too. flash-attn's is asked to be deterministic; PyTorch's is under
``torch.use_deterministic_algorithms``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

try:  # since 2.7; flash-attn 4's package of that name has neither
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, _flash_attn_varlen_forward
except ImportError:
    _flash_attn_varlen_forward = _flash_attn_varlen_backward = None
HAS_FLASH_ATTN = _flash_attn_varlen_forward is not None


class Segments(NamedTuple):
    """Which queries see which keys: segment i of the queries all (or, causal, up to its end) of segment i of the keys.

    Attributes:
        queries: [S + 1] int32 on the device, where each segment of the queries starts, and the last one's end.
        keys: [S + 1] int32, the same of keys and values.
        longest_query: Of the segments.
        longest_key: The same.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, queries: torch.Tensor, keys: torch.Tensor, device: torch.device) -> Segments:
        """From [S] lengths on the CPU, one at least."""
        starts = [torch.nn.functional.pad(x.cumsum(0), (1, 0)).to(torch.int32) for x in (queries, keys)]
        first, second = (x.to(device, non_blocking=True) for x in starts)
        return cls(first, second, int(queries.max()), int(keys.max()))


class Pattern(NamedTuple):
    """What a query sees of its segment's keys.

    Attributes:
        scale: Factor on the scores.
        causal: Queries and keys are aligned at their ends, and none sees what is behind it.
        window: Keys that a causal query sees, its own included; 0 for all.
    """

    scale: float
    causal: bool
    window: int = 0

    @property
    def sides(self) -> tuple[int, int]:
        """Keys before and behind its own that a query sees; -1 for all."""
        return (self.window - 1 if self.window else -1, 0 if self.causal else -1)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, pattern: Pattern
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, H, Dh] and log-sum-exp [H, T] fp32.

    Args:
        q: [T, H, Dh] bf16 or fp16; Dh a multiple of 8.
        k: [keys, Hkv, Dh].
        v: [keys, Hkv, Dh].
        segments: Which of them belong together.
        pattern: What a query sees.
    """
    left, right = pattern.sides
    if _flash_attn_varlen_forward is not None:
        out, lse, *_ = _flash_attn_varlen_forward(
            q, k, v, *segments, dropout_p=0.0, softmax_scale=pattern.scale, causal=pattern.causal,
            window_size_left=left, window_size_right=right, softcap=0.0, alibi_slopes=None, return_softmax=False,
        )  # fmt: skip
        return out, lse
    # A causal window is no "causal" of PyTorch's operator.
    causal = pattern.causal and not pattern.window
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *segments, 0.0, causal, False, scale=pattern.scale, window_size_left=left, window_size_right=right
    )
    return out, lse


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    segments: Segments,
    pattern: Pattern,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v by the softmax that `out` and `lse` are of, which may have seen other keys as well.

    With s the scores of the keys here, p = exp(s - lse) and ds = p (grad v - grad out): only `out` and `lse` say what
    else there was.

    Args:
        grad: [T, H, Dh] of the output.
        q: As in :func:`forward`.
        k: The same.
        v: The same.
        out: [T, H, Dh].
        lse: [H, T] fp32, contiguous.
        segments: As in :func:`forward`.
        pattern: The same.
    """
    left, right = pattern.sides
    if _flash_attn_varlen_backward is not None:
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _flash_attn_varlen_backward(
            grad, q, k, v, out, lse, *grads, *segments, dropout_p=0.0, softmax_scale=pattern.scale,
            causal=pattern.causal, window_size_left=left, window_size_right=right, softcap=0.0, alibi_slopes=None,
            deterministic=True, rng_state=None,
        )  # fmt: skip
        return grads
    unused = torch.empty(0, device=q.device)
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is not
    causal = pattern.causal and not pattern.window
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, *segments, 0.0, causal, state, unused,
        scale=pattern.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return dq, dk, dv
