"""What ``--debug`` and ``--profile`` switch on while a run trains."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from real_fast.utils.files import replacing

logger = logging.getLogger(__name__)
_SNAPSHOT_EVENTS = 100_000


@contextmanager
def debugging(on: bool) -> Iterator[None]:
    """Deterministic algorithms (a warning where there is none) and autograd's anomaly detection, for as long."""
    if not on:
        yield
        return
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.autograd.set_detect_anomaly(True):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


class Profile:
    """Profiles some updates into ``OUTPUT/profile/``: a trace for chrome://tracing or Perfetto, a table, and on CUDA a
    memory snapshot for pytorch.org/memory_viz.

    Args:
        steps: Updates to profile, after the first one that this process makes; 0 for none.
        run: The run's folder.
        device: Where it trains.
    """

    def __init__(self, steps: int, run: Path, device: torch.device) -> None:
        self.steps, self.folder, self.cuda = steps, run / "profile", device.type == "cuda"
        self._profiler: Any = None
        self._done = 0

    def __enter__(self) -> Profile:
        return self

    def step(self) -> None:
        """An update is done: start behind the first, stop when enough have been seen."""
        self._done += 1
        if self.steps and self._done == 1:
            self._start()
        elif self._done > self.steps:
            self._stop()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_EVENTS)
        self._profiler = torch.profiler.profile(activities=activities, profile_memory=True, record_shapes=True)
        self._profiler.__enter__()

    def _stop(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.__exit__(None, None, None)
        try:
            self.folder.mkdir(exist_ok=True)
            with replacing(self.folder / "trace.json") as temporary:
                profiler.export_chrome_trace(str(temporary))
            key = "self_cuda_time_total" if self.cuda else "self_cpu_time_total"
            table = profiler.key_averages().table(sort_by=key, row_limit=40)
            with replacing(self.folder / "table.txt") as temporary:
                temporary.write_text(table, encoding="utf-8")
            if self.cuda:
                with replacing(self.folder / "memory.pickle") as temporary:
                    torch.cuda.memory._dump_snapshot(str(temporary))
        except (OSError, RuntimeError) as error:
            logger.warning("the profile could not be written to %s: %s", self.folder, error)
            return
        finally:
            if self.cuda:
                torch.cuda.memory._record_memory_history(enabled=None)
        logger.info("profile of %d updates in %s", self._done - 1, self.folder)
