"""Files that are whole or absent, and their names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def free_name(path: Path) -> Path:
    """`path` where nothing has that name, else the first free one of NAME-2.suffix, NAME-3.suffix, ..."""
    free, n = path, 1
    while free.exists():
        n += 1
        free = path.with_name(f"{path.stem}-{n}{path.suffix}")
    return free


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Give an OSError the file's name, which it does not know of a write, or knows as a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; rename it to `path` afterwards, or remove it on an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named(path):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())  # or a power cut could leave the new name with nothing in it
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # on a disk that is read-only by now: the error that came first says so
            temporary.unlink(missing_ok=True)
