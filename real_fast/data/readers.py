"""Raw records, one after another, from a file, the Hugging Face hub or the built-in generator."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_fast.data import synthetic
from real_fast.errors import DataError

Records = Iterator[tuple[int, Any]]


@dataclass
class Unreadable:
    """A line of a JSON Lines file that is not JSON: why, and what it holds."""

    reason: str
    text: str


def read(source: str, split: str) -> Records:
    """Yield (place from 1, record) of every record; the place in a JSON Lines file is the line.

    Args:
        source: A .jsonl, .json (each also .gz) or .parquet file, "owner/name" on the Hugging Face hub,
            "synthetic:train" or "synthetic:eval".
        split: Split of a hub dataset; unused otherwise.

    Raises:
        DataError: The source is missing, of an unknown kind or damaged. A line that is not JSON is an
            :class:`Unreadable` record instead.
    """
    path = Path(source).expanduser()
    reader = next((reader for suffix, reader in _READERS.items() if source.lower().endswith(suffix)), None)
    if source.startswith("synthetic:"):
        yield from _synthetic(source.removeprefix("synthetic:"))
    elif may_be_on_hub(source) and not path.exists():
        yield from _hub(source, split)
    elif not path.exists():
        raise DataError(f"{source}: no such file (looked for {path.absolute()}); a hub dataset is written owner/name")
    elif path.is_dir():
        raise DataError(f"{source}: is a folder, and a file is needed ({', '.join(_READERS)})")
    elif reader is None:
        raise DataError(f"{source}: files end in {', '.join(_READERS)}, and this one in {path.suffix or 'nothing'}")
    else:
        try:
            yield from reader(path)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{source}: cannot be read: {error}") from error


def open_binary(path: Path) -> Any:
    """Open a file to read bytes from, decompressed where its name ends in .gz."""
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _jsonl(path: Path) -> Records:
    with open_binary(path) as file:
        yield from jsonl_records(file)


def jsonl_records(lines: Iterable[bytes]) -> Records:
    """Yield (line from 1, record) of every JSON line that is not blank; one that is not JSON as :class:`Unreadable`."""
    for line, data in enumerate(lines, start=1):
        try:
            text = data.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            reason = f"not UTF-8: {error.reason} at byte {error.start} of line {line}"
            yield line, Unreadable(reason, data.decode("utf-8", errors="backslashreplace"))
            continue
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            record = Unreadable(f"not JSON: {error.msg} at column {error.colno} of line {line}", text)
        except (RecursionError, ValueError) as error:  # nested too deep; an integer of thousands of digits
            record = Unreadable(f"not JSON: {error} in line {line}", text)
        yield line, record


def _json(path: Path) -> Records:
    with open_binary(path) as file:
        try:
            records = json.loads(file.read())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: is not JSON ({error}); a file with one object a line is named .jsonl") from error
    if not isinstance(records, list):
        raise DataError(f"{path}: holds one {type(records).__name__}, and a list of objects is needed")
    yield from enumerate(records, start=1)


def _parquet(path: Path) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        place = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    place += 1
                    yield place, record
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error


def may_be_on_hub(source: str) -> bool:
    """Whether a source is written as a dataset on the hub; a file of that name would come first."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None and not source.lower().endswith(tuple(_READERS))


def _hub(name: str, split: str) -> Records:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub's client raises a dozen unrelated kinds
        raise DataError(
            f"{name}: there is no such file in {Path.cwd()}, and split {split!r} of the Hugging Face dataset "
            f"could not be loaded: {type(error).__name__}: {error}"
        ) from error
    yield from enumerate(rows, start=1)


def _synthetic(which: str) -> Records:
    if which not in ("train", "eval"):
        raise DataError(f"synthetic:{which}: there is synthetic:train and synthetic:eval")
    sizes = synthetic.SIZES[which]
    yield from enumerate(synthetic.generate(*sizes, seed=0, which=which), start=1)


_READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".jsonl.gz": _jsonl,
    ".json.gz": _json,
}
