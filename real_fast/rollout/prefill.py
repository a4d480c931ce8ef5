"""Which prompts are computed together: those of about one length, so that little is padding, and those that begin
alike, whose beginning is computed once. Their caches are joined.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

# Of a prompt's place in a forward pass, the share that may be padding, and the tokens that may be in any case: less
# would make passes so small that starting them counts.
_PADDING, _FEW = 0.2, 32
# Tokens that shared beginnings must save a batch, for the passes that they add: a CPU computes few tokens in the time
# that it takes to start one, a GPU many (a guess: 40 ms at 100,000 tokens a second).
_WORTHWHILE, _WORTHWHILE_ELSEWHERE = {"cpu": 64}, 4096


@dataclass
class Beginning:
    """Tokens that several prompts begin with.

    Attributes:
        tokens: How many; every one of the prompts has a token or more behind them.
        places: Of the prompts.
    """

    tokens: int
    places: list[int]


def beginnings(prompts: Sequence[Sequence[int]], device: str) -> list[Beginning]:
    """What is computed once for several prompts, so that most tokens are saved; a prompt has one beginning at most.

    A beginning is what all prompts have in common that share so much; that of some of these, or theirs, is taken.

    Args:
        prompts: Token ids of each.
        device: Type of the device that computes them, such as "cpu".

    Returns:
        Nothing where that saves less than the passes take that it adds.
    """
    order = sorted(range(len(prompts)), key=lambda place: list(prompts[place]))
    alike = [_alike(prompts[a], prompts[b]) for a, b in pairwise(order)]
    # Open nodes of the tree of beginnings, each deeper than the one below it: all prompts from its first one on share
    # what it has, and within it the best beginnings that are closed save so many tokens.
    nodes = [_Node(0, 0)]
    for end, shared in enumerate([*alike, 0], 1):
        first, inner = end - 1, _Node(0, 0)
        while nodes[-1].tokens > shared:
            inner = nodes.pop()
            inner.close(end)
            first = inner.first
            if nodes[-1].tokens >= shared:
                nodes[-1].add(inner)
        if nodes[-1].tokens < shared:
            nodes.append(_Node(shared, first, inner.saved, inner.found))
    (root,) = nodes
    if root.saved <= _WORTHWHILE.get(device, _WORTHWHILE_ELSEWHERE):
        return []
    return [Beginning(tokens, order[first:end]) for tokens, first, end in root.found]


@dataclass
class _Node:
    """`found`: (tokens, first, end) of beginnings, and the tokens that they save."""

    tokens: int
    first: int
    saved: int = 0
    found: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, inner: _Node) -> None:
        """Take over what was found in a part of it."""
        self.saved += inner.saved
        self.found += inner.found

    def close(self, end: int) -> None:
        """Choose between its own beginning and those of its parts."""
        saved = self.tokens * (end - self.first - 1)
        if saved > max(self.saved, _FEW):
            self.saved, self.found = saved, [(self.tokens, self.first, end)]


def by_beginning(prompts: Sequence[Sequence[int]], shared: Sequence[Beginning]) -> list[int]:
    """An order of prompts in which those with a common beginning are neighbours, longest first otherwise."""
    rank = {place: (-len(prompt), place) for place, prompt in enumerate(prompts)}
    for one in shared:
        longest = min(rank[place] for place in one.places)
        rank |= dict.fromkeys(one.places, longest)
    return sorted(rank, key=lambda place: (rank[place], -len(prompts[place])))


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with, less than either has."""
    most = min(len(one), len(other)) - 1
    return bisect_left(range(1, most + 1), True, key=lambda n: one[:n] != other[:n])


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


def chosen(cache: Cache, rows: torch.Tensor) -> Cache:
    """A copy of some of a cache's sequences, each as often as its number occurs in `rows`."""
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    found.batch_select_indices(rows)
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
    if not others:
        return first
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
