"""JSON and JSON Lines files that are whole or absent, and that never hold NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from real_fast.utils.files import named, replacing


def clean(obj: Any) -> Any:
    """A copy for JSON: NaN and infinities become None, numpy values plain numbers and lists, tuples lists."""
    if isinstance(obj, dict):
        return {key: clean(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [clean(value) for value in obj]
    if isinstance(obj, np.generic | np.ndarray):
        return clean(obj.tolist())
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    return obj


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON under a temporary name, then rename: readers see the old file or the new one.

    Raises:
        ValueError: A number that is not finite (see :func:`clean`); nothing is written.
        OSError: The folder cannot be written to.
    """
    data = encode(obj, indent=2)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Write one JSON value a line, under a temporary name first. Raises as :func:`write_json` does."""
    data = b"".join(encode(row) for row in rows)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def append_jsonl(path: str | Path, obj: Any) -> None:
    """Add one line to the end of a file, made if it is not there. Raises as :func:`write_json` does."""
    data = encode(obj)
    with named(path), Path(path).open("ab") as file:
        file.write(data)


def parse(text: str) -> Any:
    """A JSON value. Raises ValueError for anything else, also for what is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read_jsonl(path: str | Path) -> list[Any]:
    """The values of a JSON Lines file. Empty lines are passed over.

    A last line that is cut off (no line end, and not JSON) is what a killed writer leaves, and is left out, also where
    the cut is in the middle of a character.

    Raises:
        ValueError: Any other line that is not JSON; the message names file and line.
    """
    rows: list[Any] = []
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                rows.append(parse(line.decode("utf-8")))
            except ValueError as error:
                if not line.endswith(b"\n"):
                    break
                what = f"not UTF-8, {error.reason}" if isinstance(error, UnicodeDecodeError) else error
                what = error.msg if isinstance(error, json.JSONDecodeError) else what
                raise ValueError(f"{path}, line {number}: not valid JSON ({what})") from error
    return rows


def encode(obj: Any, indent: int | None = None) -> bytes:
    """A JSON value as UTF-8 with a line end.

    Raises:
        ValueError: A number that is not finite (see :func:`clean`).
    """
    text = json.dumps(obj, allow_nan=False, ensure_ascii=False, indent=indent) + "\n"
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair in somebody's data: only an escape can write it
        return (json.dumps(obj, allow_nan=False, indent=indent) + "\n").encode("ascii")
