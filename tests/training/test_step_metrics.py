"""What the metrics work out on all rollouts at once, beside one rollout or group at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from real_fast.batching.pack import pack_batches
from real_fast.methods.base import LossOutput
from real_fast.training.step_metrics import StepMetrics
from tests.helpers import SCALE, make_groups
from tests.rollout.plain_agreement import plain_compare


@pytest.mark.parametrize("missing", [False, True])
def test_the_comparison_is_that_of_one_rollout_at_a_time(missing: bool) -> None:
    torch.manual_seed(0)
    groups = make_groups(missing=missing)
    parts = [[groups[2], groups[0]], [groups[1]]]  # micro-batches in another order
    metrics = StepMetrics(groups, SCALE)
    rollouts, logprobs, scores, computed = [], [], [], []
    for part, batch in zip(parts, pack_batches(parts), strict=True):
        n, m = len(batch.targets), len(batch.labels)
        rows = torch.randn(m, len(SCALE.values)).log_softmax(1)
        out = LossOutput(torch.zeros(()), rows, torch.zeros(m), torch.randn(n), torch.rand(n) < 0.7)
        metrics.add(batch, out, 0)
        mine = [r for group in part for r in group.rollouts]
        lengths = [len(r.sampled_ids) for r in mine]
        rollouts += mine
        logprobs += out.logprobs.split(lengths)
        computed += out.computed.split(lengths)
        scores += [row if r.has_score else None for r, row in zip(mine, rows, strict=True)]
    want = plain_compare(rollouts, logprobs, scores, SCALE, computed)
    found = metrics.compare_engine()
    assert (found.tokens, found.scores) == (want.tokens, want.scores)
    assert vars(found) == pytest.approx(vars(want), rel=1e-13)


def test_the_spread_of_groups_is_each_groups_own_to_the_last_bit() -> None:
    torch.manual_seed(0)
    group = torch.randint(0, 7, (60,))
    valid = torch.rand(60) < 0.8
    reward = torch.randn(60)
    metrics = StepMetrics([], SCALE)
    metrics.batches = [(None, SimpleNamespace(rewards=reward, advantages=reward))]
    kept, groups = reward[valid], group[valid]
    each = torch.stack([kept[groups == g].std(correction=0) for g in groups.unique()])
    found = metrics.rewards(valid, groups)
    assert found["reward_group_std"] == float(each.mean())
