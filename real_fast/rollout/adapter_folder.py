"""A folder through which an adapter goes from the trainer to an engine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

SHARED = Path("/dev/shm")


@contextmanager
def adapter_folder(size: int) -> Iterator[Path]:
    """An empty folder in shared memory, or among temporary files where that has no room; gone behind the ``with``.

    Args:
        size: Bytes that will be written.
    """
    roomy = SHARED.is_dir() and os.access(SHARED, os.W_OK) and shutil.disk_usage(SHARED).free > 2 * size
    with TemporaryDirectory(prefix="real-fast-adapter-", dir=SHARED if roomy else None) as folder:
        yield Path(folder)
