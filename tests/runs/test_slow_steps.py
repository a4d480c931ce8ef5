"""An update that takes much longer than is usual is said, with what grew."""

from __future__ import annotations

import logging

import pytest

from real_fast.runs.slow_steps import SlowSteps


def record(step, seconds=1.0, rollout=0.6, tokens=100.0, **more):
    return {
        "phase": "real",
        "step": step,
        "step_time": seconds,
        "time/rollout": rollout,
        "time/rollout_share": rollout / seconds,
        "time/update": seconds - rollout,
        "completions/mean_length": tokens,
        "score/pearson": None,
        **more,
    }


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="real_fast.runs.slow_steps")

    def after(*records):
        caplog.clear()
        steps = SlowSteps()
        for one in records:
            steps.see(one)
        return [message.getMessage() for message in caplog.records]

    return after


USUAL = [record(i) for i in range(1, 12)]


def test_the_phase_and_the_work_that_grew_are_said(said):
    (line,) = said(*USUAL, record(12, 4.0, 3.5, tokens=380), record(13))
    assert line.startswith("update 12 took 4.0 s (usually 1.0): time/rollout 3.5 (usually 0.6)")
    assert "tokens a rollout 380 (usually 100)" in line


def test_what_is_within_twice_the_median_or_a_second_is_not(said):
    assert said(*USUAL, record(12, 1.99)) == []
    short = [record(i, 0.01, 0.005) for i in range(1, 12)]
    assert said(*short, record(12, 0.9, 0.8)) == []
    assert len(said(*short, record(12, 1.2, 0.8))) == 1


def test_other_records_and_the_first_updates_are_passed_over(said):
    assert said({"phase": "eval", "step": 1, "eval": {}}, *USUAL[:9], record(10, 9.0)) == []
    assert said(*({**record(i), "phase": "warmup"} for i in range(1, 21)), record(1, 6.0), record(2, 6.0)) == []


def test_a_phase_that_is_not_there_else_is_the_reason(said):
    (line,) = said(*USUAL, record(12, 5.0, **{"time/wait": 4.0, "time/update": 0.4}))
    assert "time/wait 4.0 (usually 0.0)" in line
