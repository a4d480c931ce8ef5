"""A run as its trainer sees it: a folder that is its own, and a log that goes to the folder and to the trackers."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from real_fast.config import Config
from real_fast.runs import checkpoint
from real_fast.runs.folder import RunFolder
from real_fast.runs.slow_steps import SlowSteps
from real_fast.runs.trackers import Trackers

logger = logging.getLogger(__name__)


class Run:
    """As a context, it tells the trackers how it ended, and the user what there is to go on from after an error.

    Args:
        folder: The run's folder.
        trackers: Where its curves go.
        writes: Whether this process is the one that writes; the others' logs go nowhere.
    """

    def __init__(self, folder: RunFolder, trackers: Trackers, writes: bool = True) -> None:
        self.folder = folder
        self.trackers = trackers
        self.writes = writes
        self._slow_steps = SlowSteps()

    def claim(self, config: Config, resumed_step: int | None) -> None:
        """Start to write into the folder; what a resumed run makes again is set aside.

        Args:
            config: The settings, which are written there.
            resumed_step: The update that the run goes on after; None for a run from its start.
        """
        if not self.writes:
            return
        step = -1 if resumed_step is None else resumed_step
        self.folder.claim(config)
        self.folder.rewind(step)
        checkpoint.tidy(self.folder.checkpoints, step)
        self.trackers.catch_up(self.folder.metrics())

    def log(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl, which the trackers get too."""
        if self.writes:
            self.folder.log(record)
            self.trackers.log(record)
            self._slow_steps.see(record)

    def log_rollouts(self, lines: Iterable[dict[str, Any]]) -> None:
        """Lines of rollouts.jsonl."""
        for line in lines if self.writes else ():
            self.folder.append("rollouts.jsonl", line)

    def stopped(self, step: int) -> None:
        """The run was stopped after so many updates: say what it goes on from."""
        logger.info("stopped after step %d; %s", step, checkpoint.kept(self.folder.checkpoints))

    def complete(self) -> None:
        """The run has come to its end."""
        self.trackers.complete = True

    def __enter__(self) -> Run:
        if self.writes:
            self.trackers.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self.writes:
            logger.info("%s", checkpoint.kept(self.folder.checkpoints))
        if self.writes:
            self.trackers.__exit__(kind, error, trace)
