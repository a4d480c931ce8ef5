"""The long run's check can fail: a slow update whose line names a phase alone is lost."""

from __future__ import annotations

import pytest

from real_fast.runs.slow_steps import _why
from tests.soak.long import unexplained

USUAL = {"step_time": 1.0, "time/rollout": 0.6, "time/wait": 0.0, "time/update": 0.4, "body/tokens": 900.0}
USUAL |= {"completions/mean_length": 20.0, "completions/max_length": 24.0, "cores": 1.0}


@pytest.mark.parametrize(
    ("grew", "passes"),
    [
        ({}, False),
        ({"time/rollout": 3.4}, False),
        ({"time/update": 3.4}, False),
        ({"time/rollout": 3.4, "completions/mean_length": 90.0}, True),
        ({"time/rollout": 3.4, "completions/max_length": 90.0}, True),
        ({"time/update": 3.4, "body/tokens": 9000.0}, True),
        ({"time/update": 3.4, "cores": 0.3}, True),
        *(({f"time/{phase}": 3.4}, True) for phase in ("wait", "sync", "save", "eval")),
    ],
)
def test_a_slow_update_needs_a_cause_in_its_line(grew, passes):
    step = USUAL | {"step_time": 4.0} | grew
    line = _why(12, step, {key: USUAL.get(key, 0.0) for key in step}).removeprefix("update 12 took ")
    assert (unexplained(12, 4.0, line) is None) is passes
    assert "no line in the log" in str(unexplained(12, 4.0, None))
