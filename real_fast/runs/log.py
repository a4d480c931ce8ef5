"""Messages of a run, on standard error, with levels; what a run measures goes to metrics.jsonl instead."""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

from tqdm import tqdm

from real_fast.runs import progress
from real_fast.utils.secret import masked

Level = Literal["debug", "info", "warning", "error"]
_ROOT = "real_fast"
# What these warn of while they are imported (a binary for another Python, a deprecated call) is about themselves.
_IMPORTED = ("torchao", "torch.utils._pytree", "bitsandbytes.backends")


class _Stderr(logging.StreamHandler[Any]):
    """Writes to whatever ``sys.stderr`` is at the time of the message."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr

    def emit(self, record: logging.LogRecord) -> None:
        """Above an open progress bar, not across it."""
        with tqdm.external_write_mode(file=sys.stderr):
            super().emit(record)


class _Plain(logging.Formatter):
    """The message alone, without secrets; its level in front where it is not an ordinary one."""

    def format(self, record: logging.LogRecord) -> str:
        text = masked(super().format(record))
        return text if record.levelno == logging.INFO else f"{record.levelname.lower()}: {text}"


def set_up(level: Level = "info", talks: bool = True) -> None:
    """Show messages of this level and above on standard error: for the commands.

    A rank that is not the one that `talks` shows errors alone, and no bars.
    """
    level, progress.hidden = level if talks else "error", not talks
    for name in _IMPORTED:
        logging.getLogger(name).setLevel("ERROR")
    logger = logging.getLogger(_ROOT)
    logger.setLevel(level.upper())
    logger.propagate = False  # or a library's own handler on the root would show everything twice
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        handler = _Stderr()
        handler.setFormatter(_Plain())
        logger.addHandler(handler)
