"""Which prompts are computed together: those of about one length, so that little is padding, and those that begin
alike, whose beginning is computed once. Their caches are joined.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

# Of a prompt's place in a forward pass, the share that may be padding, and the tokens that may be in any case: less
# would make passes so small that starting them counts.
_PADDING, _FEW = 0.2, 32
# Tokens that take as long as one more pass does: a CPU computes few in that time, a GPU many.
_A_PASS = {"cpu": 64}
_A_PASS_ELSEWHERE = 4096


def groups(prompts: Sequence[Sequence[int]], device: str) -> list[tuple[int, list[int]]]:
    """Which prompts have their beginning computed once.

    Fewest tokens in all, where a shared beginning counts as :data:`_A_PASS` tokens more than it has.

    Args:
        prompts: Token ids of each.
        device: Type of the device that computes them, such as "cpu".

    Returns:
        (tokens that they begin with, places of the prompts, longest first) of each group; each prompt is in one. Those
        that share nothing are one group, of 0 tokens. Behind its beginning every prompt has a token or more.
    """
    a_pass = _A_PASS.get(device, _A_PASS_ELSEWHERE)
    order = sorted(range(len(prompts)), key=lambda place: list(prompts[place]))
    lengths = [len(prompts[place]) for place in order]
    # Of neighbours in this order; prompts in between begin with what the first and the last have in common.
    alike = [_alike(prompts[a], prompts[b]) for a, b in pairwise(order)]
    if max(alike, default=0) * (len(order) - 1) <= a_pass:
        return [(0, sorted(order, key=lambda place: -len(prompts[place])))]
    # For the first so many: tokens, where the last group begins, what it shares.
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    for end in range(1, len(order) + 1):
        found = best[end - 1][0] + lengths[end - 1], end - 1, 0
        shared, whole = lengths[end - 1] - 1, lengths[end - 1]
        for first in range(end - 2, -1, -1):
            shared = min(shared, alike[first], lengths[first] - 1)
            whole += lengths[first]
            if not shared:
                break
            tokens = best[first][0] + whole - (end - first - 1) * shared + a_pass
            found = min(found, (tokens, first, shared))
        best.append(found)
    made, alone, end = [], [], len(order)
    while end:
        _, first, shared = best[end]
        if shared:
            made.append((shared, order[first:end]))
        else:
            alone += order[first:end]
        end = first
    made += [(0, alone)] if alone else []
    return [(shared, sorted(some, key=lambda place: -len(prompts[place]))) for shared, some in made]


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


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


def repeated(cache: Cache, times: int) -> Cache:
    """A copy of one sequence's cache, for so many sequences that go on from there."""
    found = copy.deepcopy(cache)
    found.batch_repeat_interleave(times)
    return found


def keeps_all(config: Any) -> bool:
    """Whether, by a text model's config, every layer's cache keeps the keys and values of all tokens."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return {str(kind) for kind in kinds} == {"full_attention"}
    return not any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))


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


def joined_masks(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mask of joined caches, [prompts, longest], from each one's; 0 in front, and wherever one is."""
    longest = max(mask.shape[1] for mask in masks)
    return torch.cat([torch.nn.functional.pad(mask, (longest - mask.shape[1], 0)) for mask in masks])
