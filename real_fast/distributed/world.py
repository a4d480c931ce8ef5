"""The processes of a run. There is one for now; what several would have to agree on goes through here already."""

from __future__ import annotations

from typing import Protocol, TypeVar

T = TypeVar("T")


class World(Protocol):
    """What a trainer needs to know of, and from, the other processes."""

    rank: int
    size: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's folder and talks to people."""

    def sum(self, counts: T) -> T:
        """A dataclass of counts, added up over all processes."""

    def all(self, flag: bool) -> bool:
        """Whether it is so on every process: all take the same decision, at the same step."""

    def any(self, flag: bool) -> bool:
        """Whether it is so on one process at least, such as a signal to stop."""

    def max(self, count: int) -> int:
        """The largest of the processes' counts: each runs as many micro-batches as that."""


class OneProcess:
    """A world of one, where everybody agrees."""

    rank = 0
    size = 1
    is_main = True

    def sum(self, counts: T) -> T:
        """The counts as they are."""
        return counts

    def all(self, flag: bool) -> bool:
        """The flag as it is."""
        return flag

    def any(self, flag: bool) -> bool:
        """The flag as it is."""
        return flag

    def max(self, count: int) -> int:
        """The count as it is."""
        return count


ALONE = OneProcess()
