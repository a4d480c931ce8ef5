"""JSON lines with their grades: every record's own fields are kept, and nothing of them is overwritten."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from real_fast.data.readers import Unreadable
from real_fast.data.values import plain
from real_fast.judging.grade import Grade
from real_fast.utils.jsonio import clean, encode

RAW = "row"  # where a line that is no JSON object is kept


class Grader(Protocol):
    """What :func:`grade_lines` needs of a :class:`Judge`."""

    def grade_batch(self, rows: Sequence[Any], seed: int = 0) -> list[Grade]:
        """One grade per row, in order."""


def grade_lines(
    judge: Grader, records: Sequence[tuple[int, Any]], key: str, seed: int
) -> Iterator[tuple[bytes, Grade]]:
    """Grade records and yield a JSON line for each, in order, with its grade.

    Args:
        judge: Grades.
        records: (line, record) as :func:`real_fast.data.readers.jsonl_records` gives them.
        key: A record's fields are kept, and its grade is added under this name: feedback, score, distribution,
            off_scale_mass and decoded (and a warning), or an error. A record that has the field already is left as it
            is, with the error under the first free ``key_2``, ``key_3``, ... What is no JSON object is kept under
            ``row``.
        seed: Of the whole batch.
    """
    records = [(line, _without_nan(record)) for line, record in records]
    reasons = [_unusable(record, key) for _, record in records]
    grades = iter(judge.grade_batch([r for (_, r), why in zip(records, reasons, strict=True) if why is None], seed))
    for (_, record), why in zip(records, reasons, strict=True):
        grade = next(grades) if why is None else Grade(error=why)
        shown = {name: value for name, value in asdict(grade).items() if value is not None or not grade.error}
        shown = {name: value for name, value in shown.items() if name not in ("error", "warning") or value}
        kept = _kept(record)
        yield encode({**kept, _free(key, kept): clean(shown)}), grade


def _without_nan(record: Any) -> Any:
    """NaN, which pandas writes for a missing value, as null, which JSON has for it."""
    return plain(record) if isinstance(record, dict) else record


def _unusable(record: Any, key: str) -> str | None:
    """Why a record cannot even be handed to the judge, or None."""
    if isinstance(record, Unreadable):
        return record.reason
    if not isinstance(record, dict):
        return f"not an object: {type(record).__name__}"
    if key in record:
        return f"the row has a field {key!r} already: choose another --key"
    try:
        encode(record)
    except ValueError as error:
        return f"not JSON: {error}"
    return None


def _kept(record: Any) -> dict[str, Any]:
    """A record's own fields, in a form that can be written."""
    if isinstance(record, Unreadable):
        return {RAW: record.text.rstrip("\r\n")}
    try:
        encode(record)
    except ValueError:  # Infinity, say, which Python reads as JSON and nobody else does
        return {RAW: json.dumps(record, ensure_ascii=False)}
    return record if isinstance(record, dict) else {RAW: record}


def _free(key: str, kept: dict[str, Any]) -> str:
    name, number = key, 1
    while name in kept:
        number += 1
        name = f"{key}_{number}"
    return name
