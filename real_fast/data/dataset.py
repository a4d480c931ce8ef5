"""Judge rows from a file, the Hugging Face hub or the built-in generator, and what was rejected and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_fast.config import DataConfig
from real_fast.data.readers import Unreadable, read
from real_fast.data.rows import instruction_key, parse_row
from real_fast.data.splits import limit_by_prompt, split_by_prompt
from real_fast.errors import DataError, PromptError, RowError
from real_fast.prompt.builder import PromptBuilder
from real_fast.prompt.guard import Marked
from real_fast.score.scale import ScoreScale
from real_fast.types import JudgeRow
from real_fast.utils.jsonio import write_jsonl

# Splits and limits do not depend on the run's seed: runs with several seeds hold out the same prompts.
_SPLIT_SEED = 0
_BATCH = 1024  # rows tokenized at a time


@dataclass
class Rejected:
    """A record that was not used.

    Attributes:
        source: File, dataset or generator.
        line: Line of a JSONL file, else the record's place, from 1.
        id: The record's own id, or made of the source and the line.
        reason: Why, in the form "reason: what was found".
        row: The record as it was; text where it is not JSON.
    """

    source: str
    line: int
    id: str
    reason: str
    row: Any


@dataclass
class Dataset:
    """Rows of a run.

    Attributes:
        train: Training rows.
        eval: Evaluation rows.
        rejected: Records of both sources that were not used.
        overlap: Number of evaluation instructions that are also in the training rows; 0 unless they have files of their
            own that share some.
    """

    train: list[JudgeRow]
    eval: list[JudgeRow]
    rejected: list[Rejected]
    overlap: int


def load_rows(
    source: str,
    split: str,
    builder: PromptBuilder,
    scale: ScoreScale,
    max_prompt_tokens: int,
    rejected: list[Rejected],
) -> list[JudgeRow]:
    """Load judge rows with their prompts' token ids.

    Args:
        source: A .jsonl, .json (each also .gz) or .parquet file, "owner/name" on the Hugging Face hub, or
            "synthetic:train" and "synthetic:eval" for the built-in generator.
        split: Split of a hub dataset; unused otherwise.
        builder: Makes the prompts; a record without a rubric is rejected where its template uses one.
        scale: The labels' scale.
        max_prompt_tokens: Longest prompt; rows with a longer one are rejected, never truncated.
        rejected: Records that cannot be used are appended here, in order.

    Raises:
        DataError: The source is missing or cannot be read. Records that cannot be used raise nothing.
    """
    name = Path(source).name
    needs_rubric = builder.uses("rubric")
    parsed: list[tuple[int, Any, JudgeRow, Marked]] = []
    refused: list[Rejected] = []

    def refuse(line: int, record: Any, reason: str) -> None:
        given = record.get("id") if isinstance(record, dict) else None
        row_id = f"{name}:{line}" if given in (None, "") else str(given)
        raw = record.text if isinstance(record, Unreadable) else record
        refused.append(Rejected(source, line, row_id, reason, raw))

    for line, record in read(source, split):
        if isinstance(record, Unreadable):
            refuse(line, record, record.reason)
            continue
        try:
            row = parse_row(record, f"{name}:{line}", scale, needs_rubric)
            parsed.append((line, record, row, builder.marked(row)))
        except (RowError, PromptError) as error:
            refuse(line, record, str(error))
    rows: list[JudgeRow] = []
    ids: set[str] = set()
    for start in range(0, len(parsed), _BATCH):
        batch = parsed[start : start + _BATCH]
        for (line, record, row, _), tokens in zip(batch, builder.encode([chat for *_, chat in batch]), strict=True):
            if len(tokens) > max_prompt_tokens:
                found = f"{len(tokens)} tokens, prompt.max_tokens is {max_prompt_tokens}"
                refuse(line, record, f"prompt is too long: {found}")
                continue
            row.prompt_ids = tokens
            row.id = _unused(row.id, ids)
            rows.append(row)
    rejected.extend(sorted(refused, key=lambda r: r.line))
    return rows


def _unused(row_id: str, taken: set[str]) -> str:
    """`row_id`, with a number behind it where it is taken; it is then taken."""
    unique, n = row_id, 1
    while unique in taken:
        n += 1
        unique = f"{row_id}-{n}"
    taken.add(unique)
    return unique


def reason_counts(rejected: Sequence[Rejected]) -> dict[str, int]:
    """How many records were rejected for each reason, most frequent first."""
    return dict(Counter(r.reason.partition(":")[0] for r in rejected).most_common())


def write_rejected(path: str | Path, rejected: Sequence[Rejected]) -> None:
    """Write rejected records as JSON Lines; what JSON has no form for (NaN, dates) becomes text."""
    write_jsonl(path, (_plain(vars(r)) for r in rejected))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def check_enough_rows(rows: Sequence[JudgeRow], needed: int, source: str, rejected: Sequence[Rejected]) -> None:
    """Check that enough rows are left.

    Raises:
        DataError: Fewer than `needed`; the message counts the records that were rejected, by reason.
    """
    if len(rows) >= needed:
        return
    own = [r for r in rejected if r.source == source]
    why = [f"{count} rejected: {reason} (first {_first(own, reason)})" for reason, count in reason_counts(own).items()]
    found = f"{len(rows)} usable rows, and at least {needed} are needed"
    raise DataError(f"{source}: {found}; {'; '.join(why) or 'none was rejected'}")


def _first(rejected: Sequence[Rejected], reason: str) -> str:
    """Where the first record was rejected for a reason, and what was found."""
    first = next(r for r in rejected if r.reason.partition(":")[0] == reason)
    return f"{first.id}:{first.reason.partition(':')[2]}"


def load_train_eval(
    data: DataConfig, max_prompt_tokens: int, builder: PromptBuilder, scale: ScoreScale, needed: int, key: str
) -> Dataset:
    """Load the training and evaluation rows of a run.

    Without ``data.eval``, part of the training prompts is held out. The limits apply after that.

    Args:
        data: Where rows come from.
        max_prompt_tokens: Longest prompt; rows with a longer one are rejected.
        builder: Makes the prompts.
        scale: The labels' scale.
        needed: Training rows that one update needs.
        key: The setting that says so, for messages.

    Raises:
        DataError: A source is missing, or too few rows are left: fewer than one update needs, or none to evaluate.
    """
    rejected: list[Rejected] = []

    def load(name: str, source: str, split: str, at_least: int) -> list[JudgeRow]:
        try:
            rows = load_rows(source, split, builder, scale, max_prompt_tokens, rejected)
            check_enough_rows(rows, at_least, source, rejected)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        return rows

    train = load("data.train", data.train, data.train_split, needed)
    if data.eval:
        held_out = load("data.eval", data.eval, data.eval_split, 1)
    else:
        train, held_out = split_by_prompt(train, data.eval_fraction, _SPLIT_SEED)
    train = limit_by_prompt(train, data.max_train, _SPLIT_SEED)
    held_out = limit_by_prompt(held_out, data.max_eval, _SPLIT_SEED)
    if len(train) < needed:
        raise DataError(
            f"data.train: {len(train)} rows are left after data.eval_fraction and data.max_train, and "
            f"{key} needs {needed}"
        )
    known = {instruction_key(row.instruction) for row in train}
    overlap = len({own for row in held_out if (own := instruction_key(row.instruction)) in known})
    return Dataset(train, held_out, rejected, overlap)
