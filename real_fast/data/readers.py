"""Raw records, one after another, from a file, the Hugging Face hub or the built-in generator."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from real_fast.data import synthetic
from real_fast.data.sources import Source
from real_fast.data.tables import parquet_records, table_records
from real_fast.data.values import MAX_DEPTH, too_deep
from real_fast.errors import DataError

Records = Iterator[tuple[int, Any]]

_COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# What a file begins with that is not what its name says, and what to do about it.
_FOREIGN = {
    b"PK\x03\x04": "is a zip archive or an Excel workbook: save the sheet as CSV",
    b"version https://git-lfs": "is a Git LFS pointer in place of the file: fetch it with git lfs pull",
    b"<!doctype html": "is a web page: download the file itself",
    b"<html": "is a web page: download the file itself",
    b"\x89HDF": "is an HDF5 file: save it as JSON Lines, CSV or Parquet",
    b"ARROW1": "is an Arrow file: save it as Parquet",
}


@dataclass
class Unreadable:
    """What is no record: why, and the text of it."""

    reason: str
    text: str


def read(source: Source) -> Records:
    """Yield (place from 1, record) of every record; in JSON Lines, CSV and TSV the place is the line.

    Raises:
        DataError: The source is missing, of an unknown kind or damaged. A line that is not JSON, or a row with more or
            fewer cells than its header, is an :class:`Unreadable` record instead.
    """
    name = source.path
    path = Path(name).expanduser()
    if name.startswith("synthetic:"):
        yield from _synthetic(name.removeprefix("synthetic:"))
    elif may_be_on_hub(name) and not path.exists():
        yield from _hub(source)
    elif not path.exists():
        raise DataError(f"{name}: no such file (looked for {path.absolute()}); a hub dataset is written owner/name")
    elif path.is_dir():
        raise DataError(f"{name}: is a folder, and a file is needed: {name.rstrip('/')}/*.parquet names several")
    elif (kind := _kind(path)) is None:
        raise DataError(f"{name}: files end in {', '.join(_READERS)}, and this one in {path.suffix or 'nothing'}")
    else:
        try:
            yield from _READERS[kind](path)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{name}: cannot be read: {error}") from error


def _kind(path: Path) -> str | None:
    """Ending that says how to read a file, compression apart; None for an unknown one.

    Raises:
        DataError: The file is plainly something else.
    """
    names = path.name.lower().removesuffix(path.suffix.lower() if path.suffix.lower() in _COMPRESSED else "")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    for begins, what in _FOREIGN.items():
        if start.lstrip().lower().startswith(begins.lower()):
            raise DataError(f"{path}: {what}")
    if start.startswith(b"PAR1"):
        return ".parquet"
    return next((kind for kind in _READERS if names.endswith(kind)), None)


def open_binary(path: Path) -> IO[bytes]:
    """Open a file to read bytes of UTF-8 from: decompressed where its name ends in .gz, .bz2 or .xz or it is gzip's.

    A file in UTF-16, as Windows programs write it, is recoded.
    """
    with path.open("rb") as probe:
        start = probe.read(2)
    opener = _COMPRESSED.get(path.suffix.lower(), gzip.open if start == b"\x1f\x8b" else None)
    file: IO[bytes] = opener(path, "rb") if opener else path.open("rb")
    try:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            file.seek(0)
            with file:
                return io.BytesIO(file.read().decode("utf-16").encode())
        file.seek(0)
    except UnicodeError as error:
        raise DataError(f"{path}: begins like UTF-16 and is not: {error}") from error
    except BaseException:
        file.close()
        raise
    return file


def _jsonl(path: Path) -> Records:
    with open_binary(path) as file:
        start = file.read(1024).decode("utf-8-sig", errors="replace").lstrip()
        file.seek(0)
        if start.startswith("["):  # a JSON list under the wrong name
            try:
                yield from _listed(file.read().decode("utf-8-sig"), path)
                return
            except (ValueError, RecursionError):
                file.seek(0)
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
        if too_deep(text):
            yield line, Unreadable(f"not JSON: nested deeper than {MAX_DEPTH} levels in line {line}", text)
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            record = Unreadable(f"not JSON: {error.msg} at column {error.colno} of line {line}", text)
        except ValueError as error:  # an integer of thousands of digits
            record = Unreadable(f"not JSON: {error} in line {line}", text)
        yield line, record


def _json(path: Path) -> Records:
    with open_binary(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8: {error.reason} at byte {error.start}") from error
    first = text.lstrip().partition("\n")[0].rstrip()
    if first.startswith("{") and first.endswith("}") and _is_json(first) and not _is_json(text):
        yield from jsonl_records(data.splitlines(keepends=True))  # JSON Lines under the wrong name
        return
    try:
        yield from _listed(text, path)
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: is not JSON ({error}); a file with one object a line is named .jsonl") from error


def _listed(text: str, path: Path) -> Records:
    """The records of a JSON list. Raises ValueError or RecursionError where the text is not JSON."""
    records = json.loads(text) if text.strip() else []
    if not isinstance(records, list):
        keys = f" with the keys {', '.join(list(records)[:8])}" if isinstance(records, dict) else ""
        raise DataError(
            f"{path}: holds one {type(records).__name__}{keys}, and a list of objects is needed "
            "(pandas writes one with orient='records')"
        )
    yield from enumerate(records, start=1)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _table(path: Path) -> Records:
    with open_binary(path) as file:
        for line, row in table_records(file, path, ".tsv" in path.name.lower()):
            yield line, Unreadable(*row) if isinstance(row, tuple) else row


def may_be_on_hub(source: str) -> bool:
    """Whether a source is written as a dataset on the hub; a file of that name would come first."""
    endings = (*_READERS, *(kind + packed for kind in _READERS for packed in _COMPRESSED))
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None and not source.lower().endswith(endings)


def _hub(source: Source) -> Records:
    import datasets

    name, split = source.path, source.split
    given = {"name": source.config, "revision": source.revision}
    try:
        rows = datasets.load_dataset(name, split=split, **{k: v for k, v in given.items() if v})
    except Exception as error:  # the hub's client raises a dozen unrelated kinds
        which = "".join(f", {k} {v!r}" for k, v in (("config", source.config), ("revision", source.revision)) if v)
        raise DataError(
            f"{name}: there is no such file in {Path.cwd()}, and split {split!r}{which} of the Hugging Face dataset "
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
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": parquet_records,
}
