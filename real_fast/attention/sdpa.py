"""Shared-prompt attention by PyTorch's own scaled dot-product attention: exact, on any device, fast on the CPU.

On the CPU all responses of a group attend to their prompt in one call without a mask, each attends to itself causally
in another, and the two are merged by their log-sum-exp; nothing is copied or padded. The backward pass runs the same
blocks with the merged output and log-sum-exp, for which a softmax's gradient splits over blocks of keys. All of it is
one custom operator, so torch.compile sees one opaque call.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention

from real_fast.attention.layout import Layout

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Below this many keys, the CPU kernel's backward is 3 to 6 times as fast in fp32 as in bf16 (and more exact).
_SMALL = 512


class SdpaAttention:
    """Attention over one packed row.

    Args:
        layout: The row's segments.
        device: Where the row is computed.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self.on_cpu = device.type == "cpu"

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """[1, H, T, Dh] queries over [1, Hkv, T, Dh] keys and values to [1, H, T, Dh]."""
        if self.on_cpu:
            out: torch.Tensor
            out, _ = shared_prompt_attention(query, key, value, self.layout.segments, scale, window or 0)
            return out
        return masked_attention(query, key, value, self.layout, scale, window)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float, window: int | None
) -> torch.Tensor:
    """The plain version: each segment over its prompt's keys and its own, with an explicit mask. Shapes as above."""
    outputs = []
    for start, length, prompt, before in layout.segments.tolist():
        own, shared = slice(start, start + length), slice(prompt, prompt + before)
        keys = torch.cat([key[:, :, shared], key[:, :, own]], 2)
        values = torch.cat([value[:, :, shared], value[:, :, own]], 2)
        mask = _causal_mask(length, before, window or 0, query.device)
        part = scaled_dot_product_attention(
            query[:, :, own], keys, values, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        outputs.append(part)
    return torch.cat(outputs, 2)


def _causal_mask(length: int, before: int, window: int, device: torch.device) -> torch.Tensor:
    """[length, before + length] bool for queries at positions before.. over keys at positions 0.."""
    distance = torch.arange(before, before + length, device=device)[:, None]
    distance = distance - torch.arange(before + length, device=device)[None]
    return (distance >= 0) & (distance < window) if window else distance >= 0


@torch.library.custom_op("real_fast::shared_prompt_attention", mutates_args=(), device_types="cpu")
def shared_prompt_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: torch.Tensor, scale: float, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [1, H, T, Dh] and its log-sum-exp [1, H, T] (fp32, fp64 for fp64) of one packed row on the CPU.

    Args:
        query: [1, H, T, Dh].
        key: [1, Hkv, T, Dh].
        value: [1, Hkv, T, Dh].
        segments: See :class:`Layout`.
        scale: Factor on the scores.
        window: Positions that a token sees, its own included; 0 for all.
    """
    out = _like_states(query)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = torch.empty(query.shape[:3], dtype=wide)
    for shared, parts, cut in _groups(segments, window):
        if cut:  # a window that cuts into the group: every part over all its keys, with a mask
            for rows in (shared, *parts):
                keys, values, mask = _windowed(key, value, shared, rows, window, query.dtype)
                out[:, :, rows], lse[:, :, rows] = _block(query[:, :, rows], keys, values, scale, mask=mask)
            continue
        for rows in (shared, *parts):
            out[:, :, rows], lse[:, :, rows] = _block(
                query[:, :, rows], key[:, :, rows], value[:, :, rows], scale, causal=True
            )
        if parts:
            rows = slice(parts[0].start, parts[-1].stop)
            other, other_lse = _block(query[:, :, rows], key[:, :, shared], value[:, :, shared], scale)
            total = torch.logaddexp(lse[:, :, rows], other_lse)
            mine = out[:, :, rows] * (lse[:, :, rows] - total).exp().unsqueeze(-1)
            out[:, :, rows] = mine + other * (other_lse - total).exp().unsqueeze(-1)
            lse[:, :, rows] = total
    return out, lse


@torch.library.custom_op("real_fast::shared_prompt_attention_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    segments: torch.Tensor,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of queries, keys and values."""
    grads = (_like_states(query), _like_states(key), _like_states(value))

    def block(
        rows: slice, keys: torch.Tensor, values: torch.Tensor, causal: bool = False, mask: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        at = (slice(None), slice(None), rows)
        dtype = _block_dtype(query.dtype, keys.shape[2])
        given = [x.to(dtype) for x in (grad[at], query[at], keys, values, out[at])]
        mask = None if mask is None else mask.to(dtype)
        return list(_flash_backward(*given, lse[at].contiguous(), 0.0, causal, attn_mask=mask, scale=scale))

    for shared, parts, cut in _groups(segments, window):
        prompt_key = [torch.zeros_like(key[:, :, shared], dtype=lse.dtype) for _ in range(2)]
        if cut:
            for rows in (shared, *parts):
                keys, values, mask = _windowed(key, value, shared, rows, window, query.dtype)
                dq, *dkv = block(rows, keys, values, mask=mask)
                grads[0][:, :, rows] = dq
                before = keys.shape[2] - (rows.stop - rows.start)
                for total, whole, part in zip(prompt_key, grads[1:], dkv, strict=True):
                    whole[:, :, rows] = part[:, :, before:]
                    total[:, :, :before] += part[:, :, :before]
        else:
            for rows in (shared, *parts):
                own = block(rows, key[:, :, rows], value[:, :, rows], causal=True)
                for whole, part in zip(grads, own, strict=True):
                    whole[:, :, rows] = part
            if parts:
                rows = slice(parts[0].start, parts[-1].stop)
                dq, *dkv = block(rows, key[:, :, shared], value[:, :, shared])
                grads[0][:, :, rows] += dq
                for total, part in zip(prompt_key, dkv, strict=True):
                    total += part
        for total, whole in zip(prompt_key, grads[1:], strict=True):
            whole[:, :, shared] += total
    return grads


def _block_dtype(dtype: torch.dtype, keys: int) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) and keys < _SMALL else dtype


def _block(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of queries over one block of keys."""
    dtype = _block_dtype(query.dtype, key.shape[2])
    given = [x.to(dtype) for x in (query, key, value)]
    out, lse = _flash(*given, is_causal=causal, attn_mask=None if mask is None else mask.to(dtype), scale=scale)
    return out, lse


def _groups(segments: torch.Tensor, window: int) -> Iterator[tuple[slice, list[slice], bool]]:
    """Each group's prompt, its responses, and whether the window cuts into it."""
    rows = segments.tolist()
    starts = [i for i, row in enumerate(rows) if row[3] == 0] + [len(rows)]
    for low, high in pairwise(starts):
        shared, *parts = [slice(start, start + length) for start, length, *_ in rows[low:high]]
        longest = max(length + before for _, length, _, before in rows[low:high])
        yield shared, parts, 0 < window < longest


def _windowed(
    key: torch.Tensor, value: torch.Tensor, shared: slice, rows: slice, window: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A segment's keys and values behind its prompt's, and the additive mask."""
    before = 0 if rows == shared else shared.stop - shared.start
    if before:
        key, value = (torch.cat([x[:, :, shared], x[:, :, rows]], 2) for x in (key, value))
    else:
        key, value = key[:, :, rows], value[:, :, rows]
    seen = _causal_mask(rows.stop - rows.start, before, window, key.device)
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
    return key, value, mask[None, None]


def _like_states(states: torch.Tensor) -> torch.Tensor:
    """An empty [1, H, T, Dh] laid out as [1, T, H, Dh], as the projection behind the attention wants it."""
    batch, heads, tokens, size = states.shape
    return states.new_empty(batch, tokens, heads, size).transpose(1, 2)


@shared_prompt_attention.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: torch.Tensor, scale: float, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _like_states(query), query.new_empty(query.shape[:3], dtype=wide)


@_backward_op.register_fake
def _(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _like_states(query), _like_states(key), _like_states(value)


def _setup_context(ctx: object, inputs: tuple[object, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, segments, ctx.scale, ctx.window = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(query, key, value, *output, segments)  # type: ignore[attr-defined]


def _backward(ctx: object, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    query, key, value, out, lse, segments = ctx.saved_tensors  # type: ignore[attr-defined]
    scale, window = ctx.scale, ctx.window  # type: ignore[attr-defined]
    return (*_backward_op(grad, query, key, value, out, lse, segments, scale, window), None, None, None)


shared_prompt_attention.register_autograd(_backward, setup_context=_setup_context)
