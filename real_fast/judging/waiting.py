"""Requests that wait for the judge, graded together: one call of the engine instead of one a request."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from real_fast.errors import JudgeError
from real_fast.judging.grade import Grade

CLOSED = "this judge is closed"
_T = TypeVar("_T")


class Waiting:
    """A thread that grades what is asked for; while it is busy, requests gather, and go as one batch afterwards.

    Args:
        grade: Grades rows with a seed, one grade per row.
        most: Largest batch of gathered requests.
    """

    def __init__(self, grade: Callable[[Sequence[Any], int], list[Grade]], most: int) -> None:
        self._grade, self._most = grade, most
        self._rows: deque[tuple[Any, int, Future[Grade]]] = deque()
        self._lock = threading.Lock()
        # One thread of our own: a hundred waiting requests take none of the event loop's.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judge")

    def row(self, row: Any, seed: int) -> Future[Grade]:
        """The grade of a row, later. Raises :class:`JudgeError` after :meth:`close`."""
        future: Future[Grade] = Future()
        with self._lock:
            self._rows.append((row, seed, future))
        self.call(self._work)
        return future

    def call(self, function: Callable[[], _T]) -> Future[_T]:
        """What `function` returns in that thread, later. Raises :class:`JudgeError` after :meth:`close`."""
        try:
            return self._thread.submit(function)
        except RuntimeError as error:  # "cannot schedule new futures after shutdown"
            raise JudgeError(CLOSED) from error

    def close(self) -> None:
        """Finish what has been asked for, and end."""
        self._thread.shutdown(wait=True)

    def _work(self) -> None:
        """Grade the requests that have gathered. One call of this is queued for each, so later ones may find none."""
        taken: list[tuple[Any, int, Future[Grade]]] = []
        with self._lock:
            while self._rows and len(taken) < self._most:
                one = self._rows.popleft()
                if one[2].set_running_or_notify_cancel():  # else it was cancelled, and takes nobody's place
                    taken.append(one)
        for seed in dict.fromkeys(seed for _, seed, _ in taken):
            some = [(row, future) for row, own, future in taken if own == seed]
            try:
                grades = self._grade([row for row, _ in some], seed)
            except BaseException as error:  # whatever it is, its callers wait for it
                for _, future in some:
                    future.set_exception(error)
                continue
            for (_, future), grade in zip(some, grades, strict=True):
                future.set_result(grade)
