"""Standard output or standard error that nobody reads any more, as behind ``| head``."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def nobody_reads() -> bool:
    """Whether standard output or standard error is a pipe that was closed; what is written there from now on is lost.

    To be asked after a :class:`BrokenPipeError`, which may as well be of some other pipe: the text that could not be
    written is still waiting, and fails again.
    """
    closed = False
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except BrokenPipeError:
            closed = True
            with suppress(OSError, ValueError):  # a stream without a file
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return closed
