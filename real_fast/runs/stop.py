"""Stopping a run without losing anything."""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType
from typing import Any

from real_fast.distributed.world import ALONE, World
from real_fast.errors import UserError
from real_fast.utils.interrupt import TWICE

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The run was asked to stop where there is nothing to finish first."""

    on_all_ranks = True


class StopSignal:
    """First Ctrl-C (or SIGTERM): finish the step, write a checkpoint, stop. Second: stop at once.

    A SIGTERM that comes twice within a few seconds is one: a cluster's manager sends it to every process, and torchrun
    sends it on.

    A run that finds out by itself that it must stop does so in the same way, see :meth:`give_up`. Of several ranks, all
    stop where one was signalled, at the same step.

    Args:
        world: The ranks.
    """

    def __init__(self, world: World = ALONE) -> None:
        self._world = world
        self._signalled, self._at = False, 0.0
        self._error: UserError | None = None
        self._old: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether to stop after this step, with a checkpoint; all ranks ask."""
        return self._world.any(self._signalled or self._error is not None)

    @property
    def reason(self) -> Exception:
        """What to raise where the run stops."""
        return self._error or Stopped()

    def give_up(self, error: UserError | None) -> None:
        """Stop after this step, with a checkpoint, and end with this error, if it is one."""
        self._error = self._error or error

    def check(self, *_: object) -> None:
        """Raise :class:`Stopped`, or the error of :meth:`give_up`, where the run is to stop."""
        if self.requested:
            raise self.reason

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            if number == signal.SIGTERM and time.monotonic() - self._at < TWICE:
                return
            raise KeyboardInterrupt
        self._signalled, self._at = True, time.monotonic()
        logger.info(
            "\nstopping: an update is finished and a checkpoint written, an evaluation or a warm-up is left; once more "
            "to stop at once"
        )
