"""The processes of a run (ranks), and what they must agree on: one process, or those that torchrun started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Purpose = Literal["sampling", "saving"]


class World(Protocol):
    """What a trainer needs to know of, and from, the other processes.

    `here` are the processes on this machine.

    Every method but the properties is a collective one: all processes call it, in the same order.
    """

    rank: int
    size: int
    here: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's folder and talks to people."""

    def all(self, flag: bool) -> bool:
        """Whether it is so on every process: all take the same decision, at the same step."""

    def any(self, flag: bool) -> bool:
        """Whether it is so on one process at least, such as a signal to stop."""

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of their ranks; tensors in it must be on the CPU."""

    def main(self, value: T) -> T:
        """The main process's value, on all."""

    def together(self) -> AbstractContextManager[None]:
        """All get to the end of what is inside, or none: an error on one of them is raised on all.

        Inside, nothing may wait for another process.
        """

    def beside(self, purpose: Purpose) -> World:
        """The same processes, for a thread of its own: what it exchanges does not meet what others do."""

    def add_up(self, tensors: list[torch.Tensor]) -> None:
        """Add up tensors (in place) over all processes, such as the gradients of weights that each of them has."""


class OneProcess:
    """A world of one, where everybody agrees."""

    rank = 0
    size = here = 1
    is_main = True

    def all(self, flag: bool) -> bool:
        """The flag as it is."""
        return flag

    def any(self, flag: bool) -> bool:
        """The flag as it is."""
        return flag

    def gather(self, value: T) -> list[T]:
        """The one value."""
        return [value]

    def main(self, value: T) -> T:
        """The value as it is."""
        return value

    @contextmanager
    def together(self) -> Iterator[None]:
        """Errors are what they are."""
        yield

    def beside(self, purpose: Purpose) -> World:
        """Nothing is exchanged."""
        return self

    def add_up(self, tensors: list[torch.Tensor]) -> None:
        """The tensors stay as they are."""


ALONE = OneProcess()
