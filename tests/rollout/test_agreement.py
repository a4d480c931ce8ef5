"""The comparison of all rollouts at once, beside one rollout at a time."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from real_fast.config import RolloutConfig
from real_fast.errors import EngineMismatchError
from real_fast.rollout.agreement import gap
from real_fast.types import Rollout
from tests.helpers import SCALE
from tests.rollout.plain_agreement import plain_compare

K = len(SCALE.values)
ODD = (float("nan"), float("-inf"), float("inf"), 0.0, -745.0)


def numbers(draw, count, odd):
    return [draw.choice(ODD) if draw.random() < odd else -5 * draw.random() for _ in range(count)]


def made(lengths, draw, odd):
    """Rollouts, and log-probabilities and scores of the trainer's: on some lists, on others tensors."""
    rollouts, logprobs, scores, mask = [], [], [], []
    as_lists, dtype = draw.random() < 0.3, draw.choice((torch.float32, torch.float64))
    of = list if as_lists else lambda x: torch.tensor(x, dtype=dtype)
    for length in lengths:
        engine = numbers(draw, K, odd) if draw.random() < 0.7 else None
        rollouts.append(Rollout([3] * length, numbers(draw, length, odd), [], 0, "eos", engine, None))
        logprobs.append(of(numbers(draw, length, odd)))
        scores.append(of(numbers(draw, K, odd)) if draw.random() < 0.7 else None)
        chosen = [draw.random() < 0.6 for _ in range(length)]
        mask.append(chosen if as_lists else torch.tensor(chosen, dtype=torch.bool))
    return rollouts, logprobs, scores, mask if draw.random() < 0.7 else None


def at_once(rollouts, logprobs, scores, mask):
    def joined(rows):
        return torch.cat([torch.as_tensor(row, dtype=torch.float64) for row in rows] or [torch.zeros(0)])

    pairs = [(r.score_logprobs, s) for r, s in zip(rollouts, scores, strict=True) if r.score_logprobs and s is not None]
    engine, trainer = [joined(side) for side in zip(*pairs, strict=True)] or [torch.zeros(0)] * 2
    computed = None if mask is None else joined(mask).bool()
    return gap(joined(r.sampled_logprobs for r in rollouts), joined(logprobs), computed, engine, trainer, SCALE)


def same(a, b):
    return a == b or (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-13, abs_tol=1e-15)


@given(
    lengths=st.lists(st.integers(0, 6), max_size=6), seed=st.integers(0, 2**32), odd=st.sampled_from((0.0, 0.1, 0.5))
)
def test_all_at_once_is_one_at_a_time(lengths, seed, odd):
    rollouts, logprobs, scores, mask = made(lengths, Random(seed), odd)
    got = vars(at_once(rollouts, logprobs, scores, mask))
    want = vars(plain_compare(rollouts, logprobs, scores, SCALE, mask))
    assert all(same(got[name], want[name]) for name in want), (got, want)


def lists(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


NOTHING = torch.zeros(0)


def test_numbers_and_names():
    uniform, sure = torch.full((K,), 1 / K).log(), torch.tensor([1e-9] * (K - 1) + [1.0]).log()
    found = gap(lists(-1.0, -2.0, -3.0), lists(-1.5, -2.0, -3.1), None, uniform, sure, SCALE)
    assert (found.tokens, found.scores) == (3, 1)
    apart = float(lists(*SCALE.values).mean() - SCALE.values[-1]) / SCALE.span
    assert found.metrics() == pytest.approx(
        {
            "sampling/sampling_logp_difference/mean": 0.2,
            "sampling/sampling_logp_difference/max": 0.5,
            "sampling/score_difference/mean": abs(apart),
            "sampling/score_difference/max": abs(apart),
        },
        abs=1e-6,
    )
    at, below = abs(apart) + 0.01, abs(apart) - 0.01
    found.raise_if_above(RolloutConfig(check_logprob=0.21, check_score=at), 0, torch.float32)
    with pytest.raises(EngineMismatchError, match=r"0\.2000, largest 0\.5000 over 3 tokens"):
        found.raise_if_above(RolloutConfig(check_logprob=0.19, check_score=at), 0, torch.float32)
    with pytest.raises(EngineMismatchError, match="temperature or top_p"):
        found.raise_if_above(RolloutConfig(check_logprob=0.21, check_score=below), 0, torch.float32)


def test_what_the_trainer_has_not_computed():
    engine, trainer = lists(-1.0, -2.0, -3.0), lists(0.0, -2.0, float("nan"))
    found = gap(engine, trainer, torch.tensor([False, True, False]), NOTHING, NOTHING, SCALE)
    assert (found.tokens, found.logprob_max, found.scores) == (1, 0.0, 0)
    none = gap(engine, trainer, torch.zeros(3, dtype=torch.bool), NOTHING, NOTHING, SCALE)
    assert none.metrics() == {}
    none.raise_if_above(RolloutConfig(), 0, torch.float32)
    with pytest.raises(EngineMismatchError):  # not a number is never within a limit
        gap(engine, trainer, None, NOTHING, NOTHING, SCALE).raise_if_above(RolloutConfig(), 0, torch.float32)
