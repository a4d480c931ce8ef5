"""Prompts of about one length are computed together, so that little of it is padding; their caches are joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

# Of a prompt's place in a forward pass, the share that may be padding, and the tokens that may be in any case: less
# would make passes so small that starting them counts.
_PADDING, _FEW = 0.2, 32


def parts(lengths: Sequence[int]) -> list[slice]:
    """Which prompts share a forward pass.

    Args:
        lengths: Of the prompts in tokens, longest first.
    """
    found, first = [], 0
    for place, length in enumerate(lengths):
        if lengths[first] - length > max(_PADDING * lengths[first], _FEW):
            found.append(slice(first, place))
            first = place
    return [*found, slice(first, len(lengths))]


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both int64 [prompts, longest]; the mask is 0 on padding, which stands in front."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def can_join(cache: Cache) -> bool:
    """Whether every layer keeps the keys and values of all its tokens, and nothing else."""
    plain = all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)
    return plain and not getattr(cache, "offloading", False)


def join(caches: Sequence[Cache]) -> Cache:
    """One cache for the prompts of all, in their order; the caches are used up, layer by layer.

    Keys and values, [prompts, Hkv, tokens, Dh], get zeros in front where a cache has fewer tokens than the longest.
    """
    first, *others = caches
    for place, layer in enumerate(first.layers):
        layers: list[Any] = [layer, *(cache.layers[place] for cache in others)]
        longest = max(one.keys.shape[-2] for one in layers)
        for name in ("keys", "values"):
            some = [getattr(one, name) for one in layers]
            padded = [torch.nn.functional.pad(x, (0, 0, longest - x.shape[-2], 0)) for x in some]
            for one in layers:
                setattr(one, name, None)
            setattr(layer, name, torch.cat(padded))
    return first
