"""Memory of processes while they work: sampled beside them, held to be flat, and drawn."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from statistics import median
from types import TracebackType

import psutil

MIB = 2**20
# What a resident set may grow by from the second quarter of a run to the last: allocators round up and keep.
ALLOWED = 24 * MIB


class Watch:
    """Resident sets, each of a process with all that it started, in the background.

    Args:
        pids: By what the plot calls them.
        every: Seconds between samples.
    """

    def __init__(self, pids: dict[str, int], every: float = 1.0) -> None:
        self.samples: dict[str, list[tuple[float, int]]] = {name: [] for name in pids}
        self._pids, self._every = pids, every
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        start = time.monotonic()
        while not self._end.wait(self._every):
            for name, pid in self._pids.items():
                if size := resident(pid):
                    self.samples[name].append((round(time.monotonic() - start, 1), size))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()


def resident(pid: int) -> int:
    """Bytes that a process and those under it hold; 0 where there is none."""
    total = 0
    try:
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
    except psutil.NoSuchProcess:
        return 0
    return total


def growth(samples: list[tuple[float, int]]) -> int:
    """Bytes by which the median of the last quarter of the samples is above that of the second."""
    quarter = len(samples) // 4
    if not quarter:
        raise ValueError(f"{len(samples)} samples are too few to say whether memory is flat")
    sizes = [size for _, size in samples]
    return int(median(sizes[-quarter:]) - median(sizes[quarter : 2 * quarter]))


def not_flat(name: str, samples: list[tuple[float, int]]) -> str | None:
    """What is wrong with a curve that is not flat; None for one that is."""
    grown = growth(samples)
    return f"{name} grew by {grown / MIB:.0f} MiB (allowed: {ALLOWED / MIB:.0f})" if grown > ALLOWED else None


def thinned(samples: list[tuple[float, int]], points: int = 40) -> str:
    """Some of the samples, as "seconds:MiB" in one line of a file that people read."""
    step = max(1, len(samples) // points)
    return " ".join(f"{seconds:.0f}:{size / MIB:.0f}" for seconds, size in samples[::step])


def draw(curves: dict[str, list[tuple[float, int]]], target: Path) -> None:
    """Samples by what they are of, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot([seconds / 60 for seconds, _ in points], [size / MIB for _, size in points], label=name)
    axes.set(xlabel="minutes", ylabel="resident set, MiB", ylim=(0, None))
    axes.legend()
    figure.savefig(target, dpi=110)
