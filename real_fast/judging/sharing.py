"""What several judges may share (a loaded model, a tokenizer) and its locks, and what a fork leaves of them."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch

logger = logging.getLogger(__name__)

# By id: a lock lives as long as an Alone holds it, whose owner keeps the thing.
_LOCKS: WeakValueDictionary[int, threading.RLock] = WeakValueDictionary()
_GUARD = threading.Lock()
_MADE, _FORKED = threading.Event(), threading.Event()  # a judge was made here; here, or where this process comes from


def judge_made() -> None:
    """A judge is about to be made; where it can only have one thread, it says so."""
    _MADE.set()
    if _FORKED.is_set():
        logger.warning(
            "this process was forked from one with a judge, so it computes on one thread: the others are gone, and "
            'waiting for them would never end. Processes of multiprocessing\'s "spawn" have all threads'
        )


def _in_child() -> None:
    """Locks that a thread of the parent holds, and OpenMP's threads, would be waited for for ever after a fork."""
    global _GUARD
    _GUARD = threading.Lock()
    _LOCKS.clear()
    if _MADE.is_set():
        _FORKED.set()
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_in_child)


def _lock_of(thing: Any) -> threading.RLock:
    with _GUARD:
        lock = _LOCKS.get(id(thing))
        if lock is None:
            lock = _LOCKS[id(thing)] = threading.RLock()
        return lock


class Alone:
    """The locks of some objects; two of these that have an object in common exclude each other.

    Args:
        things: The objects; who makes an Alone keeps them as long as it.
    """

    def __init__(self, *things: Any) -> None:
        # In one order for all, so that nobody waits in a circle.
        self._locks = [_lock_of(thing) for thing in sorted(things, key=id)]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold every lock."""
        with ExitStack() as locks:
            for lock in self._locks:
                locks.enter_context(lock)
            yield
