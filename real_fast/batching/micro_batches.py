"""Spreading the groups of an update over micro-batches, and those over ranks; a group is never split."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from real_fast.batching.pack import pack_batches, pad_batch
from real_fast.errors import BatchError
from real_fast.types import Batch, Group, Rollout

REMEDY = "raise it, or lower rollout.group_size, rollout.max_tokens or prompt.max_tokens"

# Place of a group that is none, in a micro-batch that only keeps step with those of other ranks.
PLACEHOLDER = -1


def micro_batches(
    groups: Sequence[Group], budget: int, pad_id: int, shared_prompt: bool, rank: int = 0, ranks: int = 1
) -> list[Batch]:
    """Spread groups over micro-batches of at most `budget` tokens, padding included.

    Every rank has as many, of nearly equal tokens in all; where there are fewer groups than that takes, some hold no
    group but a placeholder, whose loss and gradient are exactly 0. Each rank works the spreading out by itself.

    Args:
        groups: The groups of the update, of all ranks.
        budget: Most tokens in one micro-batch.
        pad_id: Token id for padding.
        shared_prompt: One packed row per micro-batch, each prompt once; otherwise one padded sequence per rollout.
        rank: Whose micro-batches are returned.
        ranks: Over how many.

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
        sizes = [group.shared_tokens for group in groups]
        bins = balanced_bins(sizes, budget, ranks)
        parts = [[groups[i] for i in part] for part in bins]
        loads = [sum(sizes[i] for i in part) for part in bins]
    else:
        parts = _similar_lengths(groups, budget)
        parts += [[] for _ in range(-len(parts) % ranks)]
        loads = [sum(len(g.rollouts) for g in part) * max((g.longest for g in part), default=0) for part in parts]
    mine = [parts[i] or [_placeholder(groups[0].label, pad_id)] for i in deal(loads, rank, ranks)]
    return pack_batches(mine) if shared_prompt else [pad_batch(part, pad_id) for part in mine]


def balanced_bins(sizes: Sequence[int], budget: int, ranks: int = 1) -> list[list[int]]:
    """Few bins of nearly equal sums, each at most `budget`: longest processing time first (Graham 1969).

    Every item, largest first, goes into the emptiest bin; bins are added until no sum exceeds the budget.

    Args:
        sizes: Sizes, each at most `budget`.
        budget: Largest sum of a bin.
        ranks: The number of bins is a multiple of this; some are empty where there are too few items.

    Returns:
        Indices into `sizes`, ascending in every bin.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    least = max(1, -(-sum(sizes) // budget))
    for count in range(-(-least // ranks) * ranks, len(sizes) + ranks, ranks):
        bins: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, b) for b in range(count)]
        for i in order:
            load, b = heapq.heappop(loads)
            bins[b].append(i)
            heapq.heappush(loads, (load + sizes[i], b))
        if max(loads)[0] <= budget:
            return [sorted(part) for part in bins]
    return []


def deal(loads: Sequence[int], rank: int, ranks: int) -> list[int]:
    """Which of some micro-batches are a rank's: as many on each, and of about the same load at the same turn.

    They are dealt out by size, there and back, so that the sums are near each other too.

    Args:
        loads: Tokens of each; a multiple of `ranks` in number.
        rank: Whose.
        ranks: Among how many.
    """
    if ranks == 1:
        return list(range(len(loads)))
    order = sorted(range(len(loads)), key=lambda i: (-loads[i], i))
    turns = [order[at : at + ranks] for at in range(0, len(order), ranks)]
    return [turn[rank] if n % 2 == 0 else turn[ranks - 1 - rank] for n, turn in enumerate(turns)]


def _placeholder(label: float, pad_id: int) -> Group:
    """A group without a score or a sampled token; two rollouts, so that a baseline can leave one out."""
    rollout = Rollout([], [], [pad_id], 1, "length", None, None)
    return Group(PLACEHOLDER, [pad_id], label, [rollout, rollout])


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
