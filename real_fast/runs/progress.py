"""Progress bars that move while one long operation goes on: every few seconds, whatever the size of a step."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

SECONDS = 2.0  # between two drawings
hidden = False  # for a process that does not talk
_open: list[_Bar] = []


class _Bar(tqdm):
    """A tqdm bar that a thread draws anew, with what :func:`show` said last behind its name."""

    def __init__(self, name: str, **kwargs: Any) -> None:
        self.name, self.note = name, ""
        super().__init__(desc=name, file=sys.stderr, **kwargs)

    def redraw(self) -> None:
        """Draw the bar with its elapsed time and its note."""
        self.set_description(f"{self.name}, {self.note}" if self.note else self.name)

    def update(self, n: float | None = 1) -> Any:
        """Count `n` more as done; what was going on is over."""
        if n:
            self.note = ""
            self.set_description(self.name, refresh=False)
        return super().update(n)


@contextmanager
def progress_bar(name: str, total: int | None, unit: str, initial: int = 0) -> Iterator[_Bar]:
    """A bar on standard error.

    Args:
        name: What is going on.
        total: Units of it, where that is known.
        unit: Name of one.
        initial: Units that were done before.
    """
    bar = _Bar(name, total=total, unit=unit, initial=initial, disable=hidden)
    closed = threading.Event()

    def tick() -> None:
        while not closed.wait(SECONDS):
            bar.redraw()

    thread = threading.Thread(target=tick, name="progress", daemon=True)
    _open.append(bar)
    thread.start()
    try:
        yield bar
    finally:
        closed.set()
        thread.join()
        _open.remove(bar)
        bar.note = ""
        bar.set_description(name, refresh=False)
        bar.close()


def show(note: str) -> None:
    """Say what the innermost open bar is at, within its current unit; without a bar, nothing happens."""
    if _open:
        _open[-1].note = note


@contextmanager
def no_foreign_bars() -> Iterator[None]:
    """Without Transformers' bars, which move within seconds and say nothing that ours do not."""
    from transformers.utils import logging as transformers_logging

    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
