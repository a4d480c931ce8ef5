"""Judge rows from a file, the Hugging Face hub or the built-in generator, and what was rejected and why."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_fast.config import DataConfig
from real_fast.data.layouts import check_fields, has_path
from real_fast.data.readers import Unreadable, read
from real_fast.data.rows import instruction_key, parse_row
from real_fast.data.sources import Setting, Source, benchmarks, describe, sources
from real_fast.data.splits import limit_by_prompt, split_by_prompt
from real_fast.data.values import for_json
from real_fast.errors import DataError, PromptError, RowError
from real_fast.prompt.builder import PromptBuilder
from real_fast.prompt.guard import Marked
from real_fast.score.scale import ScoreScale
from real_fast.types import JudgeRow
from real_fast.utils.jsonio import write_jsonl

logger = logging.getLogger(__name__)

# Splits and limits do not depend on the run's seed: runs with several seeds hold out the same prompts.
_SPLIT_SEED = 0
_BATCH = 1024  # rows tokenized at a time
_FIELDS_SEEN = 100  # names that a message about data.fields is chosen from


@dataclass
class Rejected:
    """A record that was not used.

    Attributes:
        source: File, dataset or generator.
        line: Line of a JSON Lines, CSV or TSV file, else the record's place, from 1.
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
        eval: Evaluation rows; those of several benchmarks one after another, each with its benchmark's name.
        rejected: Records of both sources that were not used.
        overlap: Number of evaluation instructions that are also in the training rows; 0 unless they have files of their
            own that share some.
    """

    train: list[JudgeRow]
    eval: list[JudgeRow]
    rejected: list[Rejected]
    overlap: int


def load_rows(
    source: Setting,
    split: str,
    builder: PromptBuilder,
    scale: ScoreScale,
    max_prompt_tokens: int,
    rejected: list[Rejected],
    data: DataConfig | None = None,
) -> list[JudgeRow]:
    """Load judge rows with their prompts' token ids.

    Args:
        source: See :data:`real_fast.data.sources.Setting`: a .jsonl, .json, .csv, .tsv (each also .gz, .bz2 or .xz) or
            .parquet file, a pattern, "owner/name" on the Hugging Face hub, "synthetic:train" and "synthetic:eval" for
            the built-in generator, or several of these.
        split: Split of a hub dataset; unused otherwise.
        builder: Makes the prompts; a record without a rubric is rejected where its template uses one.
        scale: The labels' scale.
        max_prompt_tokens: Longest prompt; rows with a longer one are rejected, never truncated.
        rejected: Records that cannot be used are appended here, in order.
        data: Of it, fields, config and revision.

    Raises:
        ConfigError: ``data.fields`` maps what no row has.
        DataError: A source is missing or cannot be read. Records that cannot be used raise nothing.
    """
    data = data or DataConfig()
    rows: list[JudgeRow] = []
    taken: dict[str, int] = {}
    for one in sources(source, Source("", split, data.config, data.revision, data.fields)):
        rows += _load(one, builder, scale, max_prompt_tokens, rejected, taken)
    return rows


def _load(
    source: Source,
    builder: PromptBuilder,
    scale: ScoreScale,
    max_prompt_tokens: int,
    rejected: list[Rejected],
    taken: dict[str, int],
) -> list[JudgeRow]:
    """The rows of one source; `taken` has the ids of those before it."""
    check_fields(source.fields)
    name = Path(source.path).name
    needs_rubric = builder.uses("rubric")
    parsed: list[tuple[int, Any, JudgeRow, Marked]] = []
    refused: list[Rejected] = []

    def refuse(line: int, record: Any, reason: str) -> None:
        given = record.get("id") if isinstance(record, dict) else None
        known = given if isinstance(given, str | int) and given != "" else f"{name}:{line}"
        raw = record.text if isinstance(record, Unreadable) else record
        refused.append(Rejected(source.path, line, str(known), reason, raw))

    unfound, seen = dict(source.fields), set[str]()
    for line, record in read(source):
        unfound = {ours: path for ours, path in unfound.items() if not has_path(record, path)}
        if unfound and isinstance(record, Mapping) and len(seen) < _FIELDS_SEEN:
            seen.update(map(str, record))
        if isinstance(record, Unreadable):
            refuse(line, record, record.reason)
            continue
        try:
            row = parse_row(record, f"{name}:{line}", scale, needs_rubric, source.fields, builder.uses("extra"))
            prompt = builder.marked(row)
            builder.check_length(prompt, max_prompt_tokens)
            parsed.append((line, record, row, prompt))
        except (RowError, PromptError) as error:
            refuse(line, record, str(error))
    if unfound and seen:
        ours, path = next(iter(unfound.items()))
        raise DataError(
            f"data.fields.{ours} is {path!r}, which no record of {source.path} has: their fields are "
            f"{', '.join(sorted(seen))[:400]}"
        )
    rows: list[JudgeRow] = []
    for start in range(0, len(parsed), _BATCH):
        batch = parsed[start : start + _BATCH]
        for (line, record, row, _), tokens in zip(batch, builder.encode([chat for *_, chat in batch]), strict=True):
            if len(tokens) > max_prompt_tokens:
                found = f"{len(tokens)} tokens, prompt.max_tokens is {max_prompt_tokens}"
                refuse(line, record, f"prompt is too long: {found}")
                continue
            row.prompt_ids = tokens
            row.id = _unused(row.id, taken)
            rows.append(row)
    rejected.extend(sorted(refused, key=lambda r: r.line))
    return rows


def _unused(row_id: str, taken: dict[str, int]) -> str:
    """`row_id`, with a number behind it where it is taken; it is then taken.

    `taken` has, for each id, the number to go on with, so that a thousand equal ids take a thousand tries.
    """
    unique, n = row_id, taken.get(row_id, 1)
    while unique in taken:
        n += 1
        unique = f"{row_id}-{n}"
    taken[row_id] = n
    taken.setdefault(unique, 1)
    return unique


def reason_counts(rejected: Sequence[Rejected]) -> dict[str, int]:
    """How many records were rejected for each reason, most frequent first."""
    return dict(Counter(r.reason.partition(":")[0] for r in rejected).most_common())


def write_rejected(path: str | Path, rejected: Sequence[Rejected]) -> None:
    """Write rejected records as JSON Lines; what JSON has no form for (NaN, dates) becomes text."""
    write_jsonl(path, (for_json(vars(r)) for r in rejected))


def check_usable(
    rows: Sequence[JudgeRow], rejected: Sequence[Rejected], needed: int, max_rejected: float, source: Setting
) -> None:
    """Say what was rejected, with reasons and counts, and refuse data of which too little can be used.

    Args:
        rows: The usable rows of a source.
        rejected: Its other records.
        needed: Rows that there must be.
        max_rejected: Largest share of its records that may be unusable; 1 for any.
        source: For messages.

    Raises:
        DataError: Fewer than `needed` rows, or a larger share of unusable records.
    """
    check_enough_rows(rows, needed, source, rejected)
    share = len(rejected) / max(len(rows) + len(rejected), 1)
    found = f"{describe(source)}: {len(rejected)} of {len(rows) + len(rejected)} records cannot be used"
    if share > max_rejected:
        raise DataError(
            f"{found}, {share:.0%}, where data.max_rejected allows {max_rejected:.0%}: {why_rejected(rejected)}. "
            f"Mend the data or the settings{_advice(rejected)}, or set data.max_rejected to 1 to go on with the others"
        )
    if rejected:
        logger.warning("%s: %s", found, why_rejected(rejected))


def check_enough_rows(rows: Sequence[JudgeRow], needed: int, source: Setting, rejected: Sequence[Rejected]) -> None:
    """Check that enough rows are left.

    Raises:
        DataError: Fewer than `needed`; the message counts the records that were rejected, by reason.
    """
    if len(rows) >= needed:
        return
    own = {s.path for s in sources(source, Source(""))}
    why = why_rejected([r for r in rejected if r.source in own])
    found = f"{len(rows)} usable rows, and at least {needed} are needed"
    raise DataError(f"{describe(source)}: {found}; {why or 'none was rejected: there are no others'}")


def why_rejected(rejected: Sequence[Rejected]) -> str:
    """How many records were rejected for which reason, with the first of each; empty for none."""
    counts = reason_counts(rejected)
    found = [f"{count} rejected: {reason} (first {_first(rejected, reason)})" for reason, count in counts.items()]
    hint = " (data.fields maps names)" if any(reason.endswith(" is missing") for reason in counts) else ""
    return "; ".join(found) + hint


def _first(rejected: Sequence[Rejected], reason: str) -> str:
    """Where the first record was rejected for a reason, and what was found."""
    first = next(r for r in rejected if r.reason.partition(":")[0] == reason)
    text = f"{first.id}:{first.reason.partition(':')[2]}"
    return text.encode("utf-8", errors="backslashreplace").decode()  # half a surrogate pair cannot be printed


def _advice(rejected: Sequence[Rejected]) -> str:
    """What helps against the most frequent reason, where a setting does."""
    most = next(iter(reason_counts(rejected)))
    advice = {
        "label is off the scale": "scale.values, which are the scores that a label lies between",
        "prompt is too long": "prompt.max_tokens",
    }
    return f" ({advice[most]})" if most in advice else ""


def load_benchmarks(
    setting: Setting,
    split: str,
    data: DataConfig,
    max_prompt_tokens: int,
    builder: PromptBuilder,
    scale: ScoreScale,
    rejected: list[Rejected],
    name: str,
) -> list[JudgeRow]:
    """Evaluation rows of one benchmark or of several, whose rows then have its name; ``data.max_eval`` is each one's.

    Args:
        setting: One source, or several with names: see :func:`real_fast.data.sources.benchmarks`.
        split: Split of a hub dataset.
        data: Of it, fields, config, revision, max_rejected and max_eval.
        max_prompt_tokens: Longest prompt.
        builder: Makes the prompts.
        scale: The labels' scale.
        rejected: Records that cannot be used are appended here.
        name: Of the setting, for messages.

    Raises:
        DataError: A source is missing, or too few of its records can be used.
    """
    found: list[JudgeRow] = []
    for benchmark, source in benchmarks(setting).items():
        own: list[Rejected] = []
        try:
            rows = load_rows(source, split, builder, scale, max_prompt_tokens, own, data)
            rejected.extend(own)
            check_usable(rows, own, 1, data.max_rejected, source)
            rows = limit_by_prompt(rows, data.max_eval, _SPLIT_SEED)
        except DataError as error:
            raise DataError(f"{name}{'.' if benchmark else ''}{benchmark}: {error}") from error
        for row in rows:
            row.benchmark = benchmark
        found += rows
    return found


def first_of_each(rows: Sequence[JudgeRow], n: int) -> list[JudgeRow]:
    """The first rows of every benchmark, `n` in all or at least one of each."""
    names = list(dict.fromkeys(row.benchmark for row in rows))
    each = max(n // len(names), 1)
    return [row for name in names for row in [r for r in rows if r.benchmark == name][:each]]


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
    try:
        train = load_rows(data.train, data.train_split, builder, scale, max_prompt_tokens, rejected, data)
        check_usable(train, rejected, needed, data.max_rejected, data.train)
    except DataError as error:
        raise DataError(f"data.train: {error}") from error
    if data.eval:
        held_out = load_benchmarks(
            data.eval, data.eval_split, data, max_prompt_tokens, builder, scale, rejected, "data.eval"
        )
    else:
        train, held_out = split_by_prompt(train, data.eval_fraction, _SPLIT_SEED)
        held_out = limit_by_prompt(held_out, data.max_eval, _SPLIT_SEED)
    train = limit_by_prompt(train, data.max_train, _SPLIT_SEED)
    if len(train) < needed:
        raise DataError(
            f"data.train: {len(train)} rows are left after data.eval_fraction and data.max_train, and "
            f"{key} needs {needed}"
        )
    known = {instruction_key(row.instruction) for row in train}
    overlap = len({own for row in held_out if (own := instruction_key(row.instruction)) in known})
    return Dataset(train, held_out, rejected, overlap)
