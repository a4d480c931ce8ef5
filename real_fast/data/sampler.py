"""The order of the training rows: a fresh permutation each epoch, a function of the seed and the position alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class PromptSampler(Generic[T]):
    """Batches of rows by position, so that a resumed run needs no state but the number of rows seen.

    Args:
        rows: What to draw from.
        size: Rows per batch.
        seed: Seed of the permutations.
    """

    def __init__(self, rows: Sequence[T], size: int, seed: int) -> None:
        self.rows = rows
        self.size = size
        self.seed = seed

    def batch(self, position: int) -> list[T]:
        """The `size` rows that follow the first `position` ones; every row comes once before any comes again."""
        return [self._row(i) for i in range(position, position + self.size)]

    def _row(self, i: int) -> T:
        epoch, place = divmod(i, len(self.rows))
        return self.rows[self._permutation(epoch)[place]]

    def _permutation(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self.seed * 7_919 + epoch)
            self._epoch = epoch
            self._order: list[int] = torch.randperm(len(self.rows), generator=generator).tolist()
        return self._order
