"""Which updates took much longer than is usual, and by what: said in the log when it happens."""

from __future__ import annotations

import logging
import time
from collections import deque
from statistics import median
from typing import Any

logger = logging.getLogger(__name__)
_TIMES = 2  # times the median
_SECONDS = 1.0  # above the median: tiny steps vary by more than their own length
_KNOWN = 10  # updates before a median says what is usual
_WINDOW = 50  # updates that the median is of
# What may have grown with the time, by its key in a record, and in words.
_WORK = {
    "completions/mean_length": "tokens a rollout",
    "completions/max_length": "tokens of the longest rollout",
    "body/tokens": "tokens through the model",
}


class SlowSteps:
    """Sees every record of an update; of one that took over twice the median of the last 50, it says why.

    That is: the phase that grew by most, the work that grew with it, and whether the process had less of the processor
    than else, as it has beside others, or while it waits for a disk or another machine.
    """

    def __init__(self) -> None:
        self._seen: deque[dict[str, float]] = deque(maxlen=_WINDOW)
        self._clocks = (time.perf_counter(), time.process_time())

    def see(self, record: dict[str, Any]) -> None:
        """Take a record of metrics.jsonl in; those that are of no update are passed over, the warm-up's too."""
        clocks = (time.perf_counter(), time.process_time())
        (wall, busy), self._clocks = (b - a for a, b in zip(self._clocks, clocks, strict=True)), clocks
        if "step_time" not in record or record["phase"] == "warmup":
            return
        known = [key for key in record if key in _WORK or (key.startswith("time/") and key.count("/") == 1)]
        step = {key: float(record[key]) for key in ("step_time", *known) if isinstance(record[key], int | float)}
        step["cores"] = busy / max(wall, 1e-9)
        if len(self._seen) >= _KNOWN:
            seconds = median(old["step_time"] for old in self._seen)
            if step["step_time"] > max(_TIMES * seconds, seconds + _SECONDS):
                usual = {key: median(old.get(key, 0.0) for old in self._seen) for key in step}
                logger.info("%s", _why(int(record["step"]), step, usual))
        self._seen.append(step)


def _why(number: int, step: dict[str, float], usual: dict[str, float]) -> str:
    def both(key: str, digits: int = 1) -> str:
        return f"{step[key]:.{digits}f} (usually {usual[key]:.{digits}f})"

    reasons = []
    if phases := [key for key in step if key.startswith("time/") and not key.startswith("time/rollout_")]:
        most = max(phases, key=lambda key: step[key] - usual[key])
        reasons.append(f"{most} {both(most)}")
    reasons += [f"{name} {both(key, 0)}" for key, name in _WORK.items() if step.get(key, 0.0) > 1.3 * usual.get(key, 0)]
    if step["cores"] < 0.7 * usual["cores"]:
        reasons.append(f"processors in use {both('cores')}: other programs had them, or it waited")
    return f"update {number} took {step['step_time']:.1f} s (usually {usual['step_time']:.1f}): {', '.join(reasons)}"
