"""Groups are spread over micro-batches and never split."""

from __future__ import annotations

import pytest
import torch

from real_fast.batching.micro_batches import balanced_bins, micro_batches
from real_fast.errors import BatchError
from real_fast.model.policy import Policy
from tests.helpers import make_groups, size


def policy_of(tiny_llama, shared=True, **config):
    return Policy(tiny_llama(**config).double(), attention="sdpa" if shared else None)


@pytest.mark.parametrize("shared", [False, True])
def test_groups_are_never_split_and_every_rollout_comes_once(shared):
    groups = make_groups(3, n=7)
    budget = max(size(g, shared) for g in groups) * 2
    batches = micro_batches(groups, budget, 0, shared)
    seen = [g for batch in batches for g in batch.group.tolist()]
    assert sorted(seen) == sorted(g.index for g in groups for _ in g.rollouts)
    assert len(batches) > 1 and all(batch.input_ids.numel() <= budget for batch in batches)
    for a in range(len(batches)):
        for b in range(a):
            assert not set(batches[a].group.tolist()) & set(batches[b].group.tolist())


@pytest.mark.parametrize("shared", [False, True])
def test_a_group_beyond_the_budget_says_what_to_raise(shared):
    with pytest.raises(BatchError, match=r"train\.micro_batch_tokens is 8: raise it"):
        micro_batches(make_groups(), 8, 0, shared)


def test_balanced_bins():
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 7, 40):
        sizes = torch.randint(1, 100, (count,), generator=generator).tolist()
        for budget in (100, 170, 1000):
            bins = balanced_bins(sizes, budget)
            loads = [sum(sizes[i] for i in part) for part in bins]
            assert sorted(i for part in bins for i in part) == list(range(count))
            assert max(loads) <= budget and all(part == sorted(part) for part in bins)
            # Graham's bounds: never far from the fewest bins, and no further apart than one item.
            assert len(bins) <= 2 * -(-sum(sizes) // budget)
            assert max(loads) - min(loads) <= max(sizes)
    assert balanced_bins([], 10) == []
