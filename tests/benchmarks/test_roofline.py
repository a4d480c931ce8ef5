"""What the machine reaches at best is a number, whatever else it is busy with."""

from __future__ import annotations

import time

from benchmarks.roofline import _best


def test_a_run_is_measured_however_short_the_time() -> None:
    assert 0.01 <= _best(lambda: time.sleep(0.01), 0.0) < 60
