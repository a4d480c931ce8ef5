"""Where the prompts and responses of a packed row lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """The segments of one packed row, in order: each prompt is followed by its responses.

    A token sees its own segment up to itself, and the prompt of its group. Position ids restart behind the prompt for
    every response.

    Attributes:
        segments: [S, 4] int64 on the CPU: start, length, start of the prompt before it, length of that prompt. A
            prompt has no prompt before it: its last two entries are its own start and 0.
    """

    segments: torch.Tensor

    @classmethod
    def of_groups(cls, groups: Sequence[tuple[int, Sequence[int]]]) -> Layout:
        """From (prompt length, response lengths) of each group; empty responses have no segment."""
        rows, at = [], 0
        for prompt, responses in groups:
            rows.append((at, prompt, at, 0))
            first, at = at, at + prompt
            for response in responses:
                if response:
                    rows.append((at, response, first, prompt))
                    at += response
        return cls(torch.tensor(rows, dtype=torch.int64).reshape(-1, 4))

    @property
    def tokens(self) -> int:
        """T, the row's tokens."""
        return int(self.segments[:, 1].sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and response together: the longest attention span."""
        return int((self.segments[:, 1] + self.segments[:, 3]).max())

    def position_ids(self) -> torch.Tensor:
        """[T] int64."""
        start, length, _, before = self.segments.unbind(1)
        return torch.arange(self.tokens) - torch.repeat_interleave(start - before, length)

    def mask(self, window: int | None = None) -> torch.Tensor:
        """[T, T] bool, True where a query (row) sees a key (column): the definition that every backend is held to.

        Args:
            window: A token sees at most this many positions, its own included.
        """
        start, _, prompt, before = (torch.repeat_interleave(x, self.segments[:, 1]) for x in self.segments.T)
        place, position = torch.arange(self.tokens), self.position_ids()
        same = start[:, None] == start[None, :]
        in_prompt = (start[None, :] == prompt[:, None]) & (before[:, None] > 0)
        seen = (same & (place[:, None] >= place[None, :])) | in_prompt
        if window is not None:
            seen &= position[:, None] - position[None, :] < window
        return seen
