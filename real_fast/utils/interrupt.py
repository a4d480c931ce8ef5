"""A second Ctrl-C (or SIGTERM) ends a command within seconds, whatever it is in the middle of."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

GRACE = 3.0
"""Seconds that a command has, after the second signal, to end in good order."""
TWICE = 5.0
"""Seconds within which a SIGTERM behind another is the same one: a cluster's manager sends it to all, torchrun on."""


@contextmanager
def second_signal_ends(message: str, grace: float = GRACE) -> Iterator[None]:
    """While it is open, end the process `grace` seconds after its second SIGINT or SIGTERM, with status 130.

    Python runs its signal handlers between two of its own instructions, so a long operation of a library holds them up.
    A thread hears of the signal at once; libraries let other threads run while they compute, write or wait. Whatever is
    written at that moment must be written under a temporary name.

    Args:
        message: What to say on standard error where the process is ended here.
        grace: Seconds from the second signal on.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    hears, told = os.pipe()
    os.set_blocking(told, False)
    over = threading.Event()
    earlier = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(hears, over, message, grace), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(earlier)
        os.close(told)


def _watch(hears: int, over: threading.Event, message: str, grace: float) -> None:
    """Count signals, a byte each, until the pipe is closed."""
    count, terminated = 0, -TWICE
    while heard := os.read(hears, 64):
        for number in heard:
            again = number == signal.SIGTERM and time.monotonic() - terminated < TWICE
            terminated = time.monotonic() if number == signal.SIGTERM and not again else terminated
            count += number in (signal.SIGINT, signal.SIGTERM) and not again
        if count >= 2 and not over.wait(grace):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{message}\n".encode())
            os._exit(130)
    os.close(hears)
