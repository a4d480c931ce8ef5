"""All results in one file, since few files come back from some machines."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

NAME = "gpu-check.tar.gz"


def pack(out: Path, folders: Sequence[Path]) -> Path:
    """Write what the folders hold into `out`/gpu-check.tar.gz, in the place of an earlier one once it is whole.

    Args:
        out: Where the archive goes; one there is not packed into itself.
        folders: Each one's files lie at the archive's top, under their paths in the folder.

    Returns:
        The archive.
    """
    archive = out / NAME
    unfinished = archive.with_suffix(".unfinished")
    with tarfile.open(unfinished, "w:gz") as file:
        for folder in folders:
            for path in sorted(folder.rglob("*")):
                if path.is_file() and path not in (archive, unfinished):
                    file.add(path, str(path.relative_to(folder)))
    os.replace(unfinished, archive)
    return archive
