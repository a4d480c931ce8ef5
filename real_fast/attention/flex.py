"""Shared-prompt attention by FlexAttention: one compiled kernel with a block mask. CUDA (the CPU has no backward)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from real_fast.attention.layout import Layout


class FlexAttention:
    """Attention over one packed row. The block mask is built once a row, and once more for every window.

    Args:
        layout: The row's segments.
        device: Where the row is computed.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        start, length, prompt, _ = layout.segments.unbind(1)
        ids = torch.repeat_interleave(torch.stack([start, prompt]), length, 1)
        self.own, self.prompt = ids.to(device, non_blocking=True)
        self.position = layout.position_ids().to(device, non_blocking=True)
        self.tokens, self.device = layout.tokens, device
        self.masks: dict[int | None, BlockMask] = {}

    def mask_mod(self, window: int | None) -> Callable[..., torch.Tensor]:
        """FlexAttention's mask function; see :meth:`Layout.mask` for what it says."""
        own, prompt, position = self.own, self.prompt, self.position

        def seen(_b: Any, _h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            # A prompt's own start is its `prompt` too, and a response never starts where its prompt does.
            mine: torch.Tensor = (own[q] == own[k]) | (prompt[q] == own[k])
            distance = position[q] - position[k]
            near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            return mine & near

        return seen

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """[1, H, T, Dh] queries over [1, Hkv, T, Dh] keys and values to [1, H, T, Dh]."""
        if window not in self.masks:
            build = _compiled_mask() if self.device.type == "cuda" else create_block_mask
            self.masks[window] = build(
                self.mask_mod(window), None, None, self.tokens, self.tokens, device=str(self.device)
            )
        attend = _compiled() if query.is_cuda else flex_attention
        out: torch.Tensor = attend(
            query,
            key,
            value,
            block_mask=self.masks[window],
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out


@cache
def _compiled() -> Any:
    # Every row has another length: one kernel for all of them.
    return torch.compile(flex_attention, dynamic=True)


@cache
def _compiled_mask() -> Any:
    return torch.compile(create_block_mask, dynamic=True)
