"""Every error that is for people; a command prints its message alone and ends with status 2."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from real_fast.utils.interrupt import second_signal_ends
from real_fast.utils.secret import masked
from real_fast.utils.unread import nobody_reads

ON_ALL_RANKS = "(every rank of the run stops here)"
"""A note on an error that one rank met, and that all of them raise at this point, each in its way."""


class UserError(Exception):
    """What a user can mend: a wrong setting, file or model. The message names it and says what to do."""

    on_all_ranks = False
    """Whether all ranks of a run come to it together, so that the main one says it for all."""


class ConfigError(UserError, ValueError):
    """A setting, or a combination of settings, that cannot work. The message names the key and says what to do."""


class ScaleError(UserError, ValueError):
    """The tokenizer cannot express the scale with one token per score. The message names the score and its tokens."""


class PromptError(UserError, ValueError):
    """A template, or the model's chat template, that cannot build a prompt. The message names it and what is wrong."""


class RowError(UserError, ValueError):
    """A record that cannot be used; the message starts with the reason, and after ": " comes what was found."""


class DataError(UserError, ValueError):
    """Data that cannot be loaded or used. The message says what was looked for and what to do."""


class WheelMissing(UserError, RuntimeError):
    """The package that brings the model is not installed; the message says what to install."""


class ModelError(UserError, ValueError):
    """A model that is missing or that the loss cannot serve exactly."""


class UnsupportedAttentionError(UserError, ValueError):
    """A model whose attention has something that shared prompts cannot reproduce."""


class SharedPromptError(UserError, ValueError):
    """A model that shared prompts cannot serve."""


class BatchError(UserError, ValueError):
    """A group that fits into no micro-batch."""


class EngineMismatchError(UserError, RuntimeError):
    """Engine and trainer disagree by more than the settings allow. The message has the numbers and the usual causes."""

    on_all_ranks = True


class EngineError(UserError, RuntimeError):
    """A rollout engine that failed, or that gave what cannot be samples of what it got.

    Args:
        message: What is wrong, and with which row.
        place: Of the prompt among those that the engine got, where the message does not name its row.
    """

    def __init__(self, message: str, place: int | None = None) -> None:
        super().__init__(message)
        self.place = place


class RolloutServerError(UserError, RuntimeError):
    """A server of rollouts that does not answer, is another one, or holds other weights.

    Args:
        message: What is wrong, and what to do.
        status: The HTTP status that it answered with; 0 for no answer.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class NothingTrainedError(UserError, RuntimeError):
    """Updates in a row that trained nothing; the message says why and what to do."""

    on_all_ranks = True


class OutputError(UserError, OSError):
    """An output folder that cannot, or must not, be written."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that could not be written or does not fit the run."""


class NoEvaluationError(UserError, ValueError):
    """Nothing to compare. The message says where was looked and for what."""


class ElsewhereError(UserError, RuntimeError):
    """Another rank of a run failed, and says why; this one stops with it."""

    on_all_ranks = True


class GradeError(UserError, ValueError):
    """A request that cannot be graded; the message says what is missing or wrong."""


class JudgeError(UserError, RuntimeError):
    """A judge that cannot grade: closed, made in the process that this one was forked from, or its engine failed."""


_REMEDIES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or have the quota raised",
    errno.EROFS: "make that disk writable, or write to another one",
    errno.EACCES: "give this user the right to it, or take another place",
    errno.EPERM: "give this user the right to it, or take another place",
    errno.EIO: "look at the disk, which may be failing",
}


def remedy(error: OSError) -> str:
    """What the system refused and what to do about it, for people: "No space left on device: free space there"."""
    said, known = error.strerror or str(error), _REMEDIES.get(error.errno or 0)
    return f"{said}: {known}" if known else said


def _for_people(error: Exception) -> str:
    """An error that some library raised, with the file that it is about and what to do."""
    if isinstance(error, UserError) or not isinstance(error, OSError) or error.errno not in _REMEDIES:
        return str(error)
    return f"{error.filename}: {remedy(error)}" if error.filename else f"a file cannot be written: {remedy(error)}"


def raised_by_all(error: BaseException) -> bool:
    """Whether all ranks of a run raise at the point where this error comes from, so that they can still act together.

    One that an error was made of counts too.
    """
    if getattr(error, "on_all_ranks", False) or ON_ALL_RANKS in getattr(error, "__notes__", ()):
        return True
    return error.__cause__ is not None and raised_by_all(error.__cause__)


def run_command(
    prog: str, command: Callable[[], int], interrupted: str, known: tuple[type[Exception], ...] = ()
) -> int:
    """Run a command for people. A second Ctrl-C ends it within seconds, see :mod:`real_fast.utils.interrupt`.

    Args:
        prog: Its name, in front of an error's message.
        command: Returns the exit status.
        interrupted: What to say after Ctrl-C.
        known: Further errors that are the user's or the machine's.

    Returns:
        The command's exit status, 2 for a mistake of the user's or of the machine's, 130 for Ctrl-C, and 1, without a
        word, where whoever read what it prints has stopped reading (``| head``).
    """
    expected: tuple[type[Exception], ...] = (UserError, FloatingPointError, OSError, *known)
    try:
        with second_signal_ends(interrupted):
            status = command()
            print(end="", flush=True)  # not at the interpreter's end, which prints an error whatever it is
            return status
    except expected as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            return 1
        if not getattr(error, "on_all_ranks", False) or os.environ.get("RANK", "0") == "0":
            print(f"{prog}: error: {masked(_for_people(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
