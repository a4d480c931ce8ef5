"""Seconds by phase, of the update at hand and of the whole run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from real_fast.runs.progress import show


class Timer:
    """Adds up phases.

    Args:
        run: Seconds of the run by phase, which are added to in place; a checkpoint keeps them.
    """

    def __init__(self, run: dict[str, float]) -> None:
        self.run = run
        self.update: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str, within: str | None = None) -> Iterator[None]:
        """Time a phase; one that is part of another counts for the update alone."""
        show(within or phase)
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.update[phase] = self.update.get(phase, 0.0) + seconds
        if within is None:
            self.run[phase] = self.run.get(phase, 0.0) + seconds

    def add(self, phase: str, seconds: float) -> None:
        """Count what ran beside the other phases."""
        self.update[phase] = self.update.get(phase, 0.0) + seconds
        self.run[phase] = self.run.get(phase, 0.0) + seconds

    def start_update(self) -> None:
        """Forget the last update's phases."""
        self.update.clear()
        self._started = time.perf_counter()

    def metrics(self, sampled_tokens: int | None) -> dict[str, float]:
        """Of the update so far.

        Args:
            sampled_tokens: Tokens sampled in it; None for a method that samples none.
        """
        seconds = time.perf_counter() - self._started
        found = {"step_time": seconds, **{f"time/{phase}": s for phase, s in self.update.items()}}
        if sampled_tokens is not None:
            rollout = self.update["rollout"]
            found["time/rollout_share"] = rollout / seconds
            found["time/rollout_tokens_per_second"] = sampled_tokens / rollout
        return found
