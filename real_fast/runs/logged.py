"""What a run had logged when a checkpoint was written, kept with the checkpoint: what changed since is no training's.

Logs and evaluations grow and lie outside of a checkpoint's checksums. Training does not read them, and the report does.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from real_fast.utils.jsonio import parse

FILE = "logged.json"
_PATTERNS = ("metrics.jsonl", "rollouts.jsonl", "eval/*.json", "eval/*.jsonl")
logger = logging.getLogger(__name__)


def text_of(run: Path, patterns: Sequence[str] = _PATTERNS) -> str:
    """Size and SHA-256 of each of a run's logs and evaluations, or of other files of it, as they are now.

    What cannot be read is left out, with a warning.
    """
    known: dict[str, Any] = {}
    for path in sorted(path for pattern in patterns for path in run.glob(pattern)):
        try:
            found = _found(path, path.stat().st_size)
        except OSError:
            found = None
        if found is None:
            logger.warning("%s cannot be read: a damage of it will not be found", path)
        else:
            known[path.relative_to(run).as_posix()] = found
    return json.dumps(known, indent=1)


def check(run: Path, checkpoint: Path) -> None:
    """Warn of logs and evaluations that are not what they were; one of an earlier version has nothing to compare with.

    Args:
        run: The run's folder. What was logged since stands behind what is compared.
        checkpoint: The one that the run goes on from.
    """
    try:
        names = changed(run, checkpoint / FILE)
    except (OSError, ValueError) as error:
        logger.warning(
            "%s cannot be read (%s): whether logs and evaluations changed is not known", checkpoint / FILE, error
        )
        return
    if names:
        logger.warning(
            "%s: not as it was when %s was written. Training reads nothing of it; the report, the figures and the "
            "trackers show what is there now",
            ", ".join(str(run / name) for name in names),
            checkpoint.name,
        )


def changed(run: Path, file: Path) -> list[str]:
    """Names of what does not begin any more with what :func:`text_of` saw; none where its text is not in that file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not what :func:`text_of` wrote.
    """
    known = parse(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(known, dict):
        raise ValueError("no object")
    names: list[str] = []
    for name, want in known.items():
        if want is None:  # of an earlier version, which could not read it
            continue
        if not isinstance(want, dict) or type(want.get("bytes")) is not int:
            raise ValueError(f"{name} has no size")
        if _found(run / name, want["bytes"]) != want:
            names.append(name)
    return names


def _found(path: Path, size: int) -> dict[str, Any] | None:
    """Of the first `size` bytes; None where they are not there."""
    try:
        with path.open("rb") as file:
            found, left = hashlib.sha256(), size
            while left and (piece := file.read(min(left, 2**20))):
                found.update(piece)
                left -= len(piece)
    except OSError:
        return None
    return None if left else {"bytes": size, "sha256": found.hexdigest()}
