"""Spreading the groups of an update over micro-batches; a group is never split."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from real_fast.batching.pack import pack_batch, pad_batch
from real_fast.errors import BatchError
from real_fast.types import Batch, Group

REMEDY = "raise it, or lower rollout.group_size, rollout.max_tokens or prompt.max_tokens"


def micro_batches(groups: Sequence[Group], budget: int, pad_id: int, shared_prompt: bool) -> list[Batch]:
    """Spread groups over micro-batches of at most `budget` tokens, padding included.

    Args:
        groups: The groups of the update.
        budget: Most tokens in one micro-batch.
        pad_id: Token id for padding.
        shared_prompt: One packed row per micro-batch, each prompt once; otherwise one padded sequence per rollout.

    Raises:
        BatchError: A group longer than the budget.
    """
    for group in groups:
        need = group.shared_tokens if shared_prompt else len(group.rollouts) * group.longest
        if need > budget:
            raise BatchError(
                f"a group of {len(group.rollouts)} rollouts of up to {group.longest} tokens, prompt included, needs "
                f"{need} tokens in one micro-batch, and train.micro_batch_tokens is {budget}: {REMEDY}"
            )
    if shared_prompt:
        bins = balanced_bins([group.shared_tokens for group in groups], budget)
        return [pack_batch([groups[i] for i in part]) for part in bins]
    return [pad_batch(part, pad_id) for part in _similar_lengths(groups, budget)]


def balanced_bins(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Few bins of nearly equal sums, each at most `budget`: longest processing time first (Graham 1969).

    Every item, largest first, goes into the emptiest bin; one bin is added until no sum exceeds the budget.

    Args:
        sizes: Sizes, each at most `budget`.
        budget: Largest sum of a bin.

    Returns:
        Indices into `sizes`, ascending in every bin.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    for count in range(max(1, -(-sum(sizes) // budget)), len(sizes) + 1):
        bins: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, b) for b in range(count)]
        for i in order:
            load, b = heapq.heappop(loads)
            bins[b].append(i)
            heapq.heappush(loads, (load + sizes[i], b))
        if max(loads)[0] <= budget:
            return [sorted(part) for part in bins]
    return []


def _similar_lengths(groups: Sequence[Group], budget: int) -> list[list[Group]]:
    """Groups of similar length together, so that little is padded."""
    batches: list[list[Group]] = []
    used = 0
    for group in sorted(groups, key=lambda g: (-g.longest, g.index)):
        # The first group of a micro-batch is its longest, so it sets the width for all.
        if batches and (used + len(group.rollouts)) * batches[-1][0].longest <= budget:
            batches[-1].append(group)
            used += len(group.rollouts)
        else:
            batches.append([group])
            used = len(group.rollouts)
    return batches
