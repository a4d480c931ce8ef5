"""Locks for what several judges may share: a loaded model, a tokenizer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakValueDictionary

# By id: a lock lives as long as an Alone holds it, whose owner keeps the thing.
_LOCKS: WeakValueDictionary[int, threading.RLock] = WeakValueDictionary()
_GUARD = threading.Lock()


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
