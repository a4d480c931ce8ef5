"""Stopping a run without losing anything."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The run was asked to stop where there is nothing to finish first."""


class StopSignal:
    """First Ctrl-C (or SIGTERM): finish the step, write a checkpoint, stop. Second: stop at once."""

    def __init__(self) -> None:
        self.requested = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._handle)
        return self

    def check(self, *_: object) -> None:
        """Raise :class:`Stopped` if a signal came."""
        if self.requested:
            raise Stopped

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.info("\nstopping after this step, with a checkpoint; once more to stop at once")
