"""One process at a time writes into a folder.

The lock is the operating system's (flock), so that it ends with its process, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from real_fast.distributed.world import ALONE, World
from real_fast.errors import OutputError, remedy

logger = logging.getLogger(__name__)
LOCK = ".lock"


@contextmanager
def alone_in(output: str | Path, world: World = ALONE) -> Iterator[None]:
    """Hold a folder's lock, which is its file .lock, with pid and host of who holds it. The folder is made.

    Args:
        output: The folder.
        world: The ranks of the run; the main one holds the lock for all.

    Raises:
        OutputError: Another process holds it; the message says which. Or the folder cannot be written.
    """
    with ExitStack() as held:
        with world.together():
            if world.is_main:
                held.enter_context(_held(output))
        yield


@contextmanager
def _held(output: str | Path) -> Iterator[None]:
    folder = Path(output).expanduser()
    if folder.is_symlink() and not folder.exists():
        raise OutputError(f"output {folder} is a link to {os.readlink(folder)}, which does not exist: make that folder")
    if not folder.is_dir() and folder.exists():
        raise OutputError(f"output {folder} is a file: give the name of a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder / LOCK)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"output {folder} cannot be written: {remedy(error)}") from error
    try:
        yield
    finally:
        # Of this folder as it is now: it may have been moved aside, and its lock taken along (see move_lock).
        try:
            if _is(file, folder / LOCK):
                (folder / LOCK).unlink(missing_ok=True)
        except OSError as error:  # a file that nobody has locked is no lock
            logger.warning(
                "%s could not be removed (%s), and is in nobody's way: remove it", folder / LOCK, error.strerror
            )
        file.close()


def move_lock(old: Path, new: Path) -> None:
    """Take a folder's lock along to the one that now has its name.

    Raises:
        OutputError: Another process was there first.
    """
    if not (old / LOCK).is_file():
        return
    new.mkdir(exist_ok=True)
    try:
        os.link(old / LOCK, new / LOCK)
    except FileExistsError as error:
        raise OutputError(f"output {new} {_held_by(new / LOCK)}") from error
    (old / LOCK).unlink()


def _locked(path: Path) -> IO[str]:
    """The lock's file, open and locked."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise OutputError(f"output {path.parent} {_held_by(path)}") from error
        except OSError as error:
            logger.warning("%s has no file locks (%s): see to it that no other run writes there", path.parent, error)
        if _is(file, path):  # and not one that its owner has just removed
            break
        file.close()
    left = _owner(path)
    if left and left.get("host") != socket.gethostname():
        logger.warning(
            "the lock of %s was left by process %s on %s, where locks of this machine may not be seen: if that process "
            "still runs, stop one of the two",
            path.parent,
            left.get("pid"),
            left.get("host"),
        )
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    file.flush()
    return file


def _is(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _owner(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _held_by(path: Path) -> str:
    owner = _owner(path)
    who = f"process {owner['pid']} on {owner.get('host')}" if "pid" in owner else "another process"
    return f"is being written by {who}: wait for its end, stop it, or take another --output"
