"""Records of tables: CSV, TSV and Parquet."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from real_fast.errors import DataError


def table_records(file: IO[bytes], path: Path, tabs: bool) -> Iterator[tuple[int, dict[str, str] | tuple[str, str]]]:
    """Yield (line on which the row begins, {column: text}); (reason, text) for a row that does not fit the header.

    Args:
        file: UTF-8, with or without a byte order mark.
        path: For messages.
        tabs: Columns are separated by tabs; otherwise by what the header has most of outside
            quotes: comma, semicolon, tab or bar; or by what Excel's line `sep=;` says.

    Raises:
        DataError: Not UTF-8, no header, a column name that stands there twice, or quotes that do not close.
    """
    csv.field_size_limit(sys.maxsize)  # a response may be longer than csv's 131,072 characters
    begins = 1
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        head = text.readline()
        text.seek(0)
        if excel := re.fullmatch(r'"?sep=([^"\s]|\t)"?\s*', head):  # Excel's own line in front of the header
            text.readline()
        names = re.sub(r'"[^"]*"?', "", head)  # a quoted name may hold any of them
        delimiter = excel[1] if excel else "\t" if tabs else max(",;\t|", key=names.count)
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(reader, [])]
        _check_header(header, path)
        above = 1 if excel else 0
        begins = above + reader.line_num + 1
        for cells in reader:
            if cells:
                if len(cells) == len(header):
                    yield begins, {k: v for k, v in zip(header, cells, strict=True) if k}
                else:
                    reason = (
                        f"not a row of the table: {len(cells)} cells in line {begins}, the header has {len(header)}"
                    )
                    yield begins, (reason, delimiter.join(cells))
            begins = above + reader.line_num + 1
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is not UTF-8 ({error.reason}, byte {error.object[error.start]:#x}): save it as UTF-8"
        ) from error
    except csv.Error as error:
        raise DataError(f"{path}: is not CSV: {error} in the row that begins in line {begins}") from error


def parquet_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (place from 1, record) of every row of a Parquet file.

    Raises:
        DataError: It cannot be read, or a column's name stands there twice.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        place = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_header(file.schema_arrow.names, path)
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    place += 1
                    yield place, record
    except (pyarrow.ArrowException, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error


def _check_header(names: Sequence[str], path: Path) -> None:
    """A header without a name, or with one twice, is an error; a column without a name is passed over."""
    if repeated := [name for name, count in Counter(filter(None, names)).items() if count > 1]:
        raise DataError(f"{path}: has two columns {repeated[0]!r}: rename or remove one")
    if not any(names):
        raise DataError(f"{path}: is empty: it has no header")
