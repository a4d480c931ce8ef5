"""Splits and limits by prompt: rows that share a prompt stay together."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from real_fast.errors import DataError
from real_fast.types import JudgeRow


def _shuffled_prompts(rows: Sequence[JudgeRow], seed: int) -> list[str]:
    """The prompt ids in an order that depends on the ids and the seed alone, not on the order of the rows."""
    return sorted({row.prompt_id for row in rows}, key=lambda p: (hashlib.sha256(f"{seed}:{p}".encode()).digest(), p))


def split_by_prompt(rows: Sequence[JudgeRow], fraction: float, seed: int) -> tuple[list[JudgeRow], list[JudgeRow]]:
    """Hold out whole prompts.

    Args:
        rows: Rows to split.
        fraction: Share of the prompts to hold out; at least one prompt is, and at least one is not.
        seed: Another seed holds out other prompts.

    Returns:
        (train, eval), each in the order of `rows`.

    Raises:
        DataError: Fewer than two prompts.
    """
    prompts = _shuffled_prompts(rows, seed)
    if len(prompts) < 2:
        raise DataError(
            f"{len(rows)} rows of {len(prompts)} prompt cannot be split into training and evaluation: give data.eval"
        )
    held_out = set(prompts[: min(max(round(fraction * len(prompts)), 1), len(prompts) - 1)])
    return [r for r in rows if r.prompt_id not in held_out], [r for r in rows if r.prompt_id in held_out]


def limit_by_prompt(rows: Sequence[JudgeRow], n: int, seed: int) -> list[JudgeRow]:
    """At most `n` rows, whole prompts only: prompts in an order shuffled by `seed`, each taken if it still fits.

    Args:
        rows: Rows to choose from; the result keeps their order.
        n: Most rows; 0 for all.
        seed: Another seed takes other prompts.

    Raises:
        DataError: No prompt has as few as `n` rows.
    """
    if n == 0 or n >= len(rows):
        return list(rows)
    sizes = Counter(row.prompt_id for row in rows)
    taken: set[str] = set()
    left = n
    for prompt in _shuffled_prompts(rows, seed):
        if sizes[prompt] <= left:
            taken.add(prompt)
            left -= sizes[prompt]
    if not taken:
        raise DataError(f"a limit of {n} rows holds no whole prompt: the smallest has {min(sizes.values())} rows")
    return [row for row in rows if row.prompt_id in taken]
