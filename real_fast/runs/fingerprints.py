"""What a run's course depends on, kept with each checkpoint, so that a resumed run cannot become another one unseen.

Which settings a resumed run may change stands beside each of them in :mod:`real_fast.config.schema` (``resume=``):

- "same", where nothing is said: it decides what is trained or measured, and a change is refused;
- "free": a change makes the same run, written, watched or computed in another way;
- "up": it may grow;
- "contents": it names something whose contents have a fingerprint of their own;
- "call": it is about one call of the command, not about the run.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_fast.errors import CheckpointError
from real_fast.utils.jsonio import parse

logger = logging.getLogger(__name__)
FILE = "fingerprints.json"


@dataclass(frozen=True)
class Setting:
    """A setting's value, its default, and what a resumed run may do to it."""

    value: Any
    default: Any
    resume: str


@dataclass(frozen=True)
class Fingerprints:
    """Of one run.

    Attributes:
        settings: By key, such as "optim.lr".
        contents: Digests of what settings only name, such as "the training rows"; for people, counts included.
    """

    settings: dict[str, Any]
    contents: dict[str, str]

    def text(self) -> str:
        """As a file."""
        return json.dumps(dataclasses.asdict(self), indent=1)


def read(checkpoint: Path) -> Fingerprints | None:
    """Those of a checkpoint; None where it is of a version that wrote none.

    Raises:
        CheckpointError: The file is damaged.
    """
    file = checkpoint / FILE
    if not file.is_file():
        return None
    try:
        found = Fingerprints(**parse(file.read_text(encoding="utf-8")))
        if not isinstance(found.settings, dict) or not isinstance(found.contents, dict):
            raise TypeError("settings and contents are no objects")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{file} is damaged ({error}): bring it back from a copy, or move this checkpoint away, and the run goes "
            "on from the one before"
        ) from error
    return found


def settings_of(config: Any, prefix: str = "", inherited: str = "") -> dict[str, Setting]:
    """Every setting of a dataclass, nested ones included, by its key; what a section says holds for all in it."""
    found: dict[str, Setting] = {}
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        resume = inherited or field.metadata.get("resume", "")
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        if dataclasses.is_dataclass(value):
            found |= settings_of(value, f"{key}.", resume)
            if default is None:  # a section that need not be there: that it is decides as much as what it says
                found[key] = Setting(True, None, resume or "same")
        else:
            found[key] = Setting(value, default, resume or "same")
    return found


def check(old: Fingerprints, new: Fingerprints, settings: dict[str, Setting], allowed: bool) -> None:
    """Compare a checkpoint's with a run's own; what may change, or is allowed to, is a warning.

    Args:
        old: Of the checkpoint.
        new: Of the run that is to go on from it.
        settings: The run's, as :func:`settings_of` gives them.
        allowed: Whether the user insists.

    Raises:
        CheckpointError: Something changed that must not; the message has every such thing, new and old.
    """
    contents = [
        f"{name}: {digest}, which was {old.contents[name]}"
        for name, digest in new.contents.items()
        if name in old.contents and old.contents[name] != digest
    ]
    refused: list[str] = []
    harmless: list[str] = []
    for key, setting in settings.items():
        # A setting that the checkpoint's version did not have was at what is its default now.
        was = old.settings.get(key, setting.default)
        if was == setting.value or setting.resume == "call":
            continue
        same_run = {
            "free": True,
            "up": setting.resume == "up" and setting.value > was,
            "contents": not contents,
        }.get(setting.resume, False)
        (harmless if same_run else refused).append(f"{key} = {setting.value!r}, which was {was!r}")
    refused += contents
    if refused and not allowed:
        raise CheckpointError(
            f"resume: this would be another run. {'; '.join(refused)}. Put it back as it was, take another --output, "
            "or go on all the same with --allow-changed"
        )
    for change in (*harmless, *refused):
        logger.warning("resuming with %s", change)
