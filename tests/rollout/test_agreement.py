"""The comparison of all rollouts at once, beside one rollout at a time."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from real_fast.rollout.agreement import compare
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


def same(a, b):
    return a == b or (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-13, abs_tol=1e-15)


@given(
    lengths=st.lists(st.integers(0, 6), max_size=6), seed=st.integers(0, 2**32), odd=st.sampled_from((0.0, 0.1, 0.5))
)
def test_all_at_once_is_one_at_a_time(lengths, seed, odd):
    rollouts, logprobs, scores, mask = made(lengths, Random(seed), odd)
    got = vars(compare(rollouts, logprobs, scores, SCALE, mask))
    want = vars(plain_compare(rollouts, logprobs, scores, SCALE, mask))
    assert all(same(got[name], want[name]) for name in want), (got, want)


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
    wrong=st.sets(st.tuples(st.sampled_from(("logprobs", "scores", "engine")), st.integers(0, 4)), min_size=1),
)
def test_the_same_rollout_is_refused_in_the_same_words(lengths, seed, wrong):
    rollouts, logprobs, scores, mask = made(lengths, Random(seed), 0.0)
    for what, at in wrong:
        i = at % len(rollouts)
        if what == "logprobs":
            logprobs[i] = [*logprobs[i], 0.0]
        elif what == "scores" and scores[i] is not None:
            scores[i] = scores[i][:-1]
        elif rollouts[i].score_logprobs is not None:
            rollouts[i].score_logprobs = [-1.0] * (K + 1)
    said = []
    for each in (plain_compare, compare):
        try:
            each(rollouts, logprobs, scores, SCALE, mask)
            said.append(None)
        except ValueError as error:
            said.append(str(error))
    assert said[0] == said[1]


def test_a_list_that_is_missing_is_counted():
    rollouts, logprobs, scores, _ = made([2, 3], Random(0), 0.0)
    with pytest.raises(ValueError, match=r"2 rollouts, 1 rows .*, 2 of scores and 2 of the mask"):
        compare(rollouts, logprobs[:1], scores, SCALE)
