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

FILE = "logged.json"
_PATTERNS = ("metrics.jsonl", "rollouts.jsonl", "eval/*.json", "eval/*.jsonl")
logger = logging.getLogger(__name__)


def text_of(run: Path, patterns: Sequence[str] = _PATTERNS) -> str:
    """Size and SHA-256 of each of a run's logs and evaluations, or of other files of it, as they are now."""
    paths = sorted(path for pattern in patterns for path in run.glob(pattern))
    return json.dumps({path.relative_to(run).as_posix(): _found(path, path.stat().st_size) for path in paths}, indent=1)


def check(run: Path, checkpoint: Path) -> None:
    """Warn of logs and evaluations that are not what they were; one of an earlier version has nothing to compare with.

    Args:
        run: The run's folder. What was logged since stands behind what is compared.
        checkpoint: The one that the run goes on from.
    """
    if names := changed(run, checkpoint / FILE):
        logger.warning(
            "%s: not as it was when %s was written. Training reads nothing of it; the report, the figures and the "
            "trackers show what is there now",
            ", ".join(str(run / name) for name in names),
            checkpoint.name,
        )


def changed(run: Path, file: Path) -> list[str]:
    """Names of what does not begin any more with what :func:`text_of` saw; none where its text is not in that file."""
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return [name for name, want in known.items() if _found(run / name, want["bytes"]) != want]


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
