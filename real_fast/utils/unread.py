"""Standard output or standard error that nobody reads any more, as behind ``| head``."""

from __future__ import annotations

import os
import select
import sys


def nobody_reads() -> bool:
    """Whether standard output or standard error is a pipe that was closed; what is written there from now on is lost.

    To be asked after a :class:`BrokenPipeError`, which may as well be of some other pipe.
    """
    closed = [number for number in map(_number, (sys.stdout, sys.stderr)) if number is not None and _is_closed(number)]
    for number in closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)  # or the interpreter's end would print the error after all
    return bool(closed)


def _number(stream: object) -> int | None:
    """A stream's file number; None where it has none, as while a test captures it."""
    try:
        return int(stream.fileno())  # type: ignore[attr-defined]
    except (OSError, ValueError, AttributeError):
        return None


def _is_closed(number: int) -> bool:
    poll = select.poll()
    poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
