"""One process at a time writes into a folder.

The lock is the operating system's (flock), so that it ends with its process, however that ends, and what its file says
is for people. Where a file system has no such locks, the process that the file names is looked for instead.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from real_fast.distributed.world import ALONE, World
from real_fast.errors import OutputError, remedy
from real_fast.utils.jsonio import parse

logger = logging.getLogger(__name__)
LOCK = ".lock"
_held_files: set[IO[str]] = set()


@contextmanager
def alone_in(output: str | Path, world: World = ALONE) -> Iterator[None]:
    """Hold a folder's lock, which is its file .lock, with pid and host of who holds it. The folder is made.

    Args:
        output: The folder.
        world: The ranks of the run. The main one takes the lock; the others share it, since one that outlives the main
            one may still write.

    Raises:
        OutputError: Another process holds it; the message says which. Or the folder cannot be written.
    """
    folder = Path(output).expanduser()
    with ExitStack() as held:
        with world.together():
            if world.is_main:
                held.enter_context(_held(folder, world.size > 1))
        with world.together():
            if not world.is_main:
                held.enter_context(_shared(folder / LOCK))
        yield


@contextmanager
def _held(folder: Path, share: bool) -> Iterator[None]:
    if folder.is_symlink() and not folder.exists():
        raise OutputError(f"output {folder} is a link to {os.readlink(folder)}, which does not exist: make that folder")
    if not folder.is_dir() and folder.exists():
        raise OutputError(f"output {folder} is a file: give the name of a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder / LOCK)
        if share:
            _lock(file, folder / LOCK, fcntl.LOCK_SH)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"output {folder} cannot be written: {remedy(error)}") from error
    _held_files.add(file)
    try:
        yield
    finally:
        _let_go(file, folder / LOCK)


def _let_go(file: IO[str], path: Path) -> None:
    """End a lock. Whoever is the last one to hold it removes its file: another rank may still write."""
    # Of this folder as it is now: it may have been moved aside, and its lock taken along (see move_lock). Not in a
    # forked process, which has no part in it.
    try:
        if file in _held_files and _last(file) and _is(file, path):
            path.unlink(missing_ok=True)
    except OSError as error:  # a file that nobody has locked is no lock
        logger.warning("%s could not be removed (%s), and is in nobody's way: remove it", path, error.strerror)
    _held_files.discard(file)
    file.close()


def _last(file: IO[str]) -> bool:
    """Whether nobody else holds it: of ranks that end at once, one takes the whole lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks there: it is the main rank's
        return True
    return True


@contextmanager
def _shared(path: Path) -> Iterator[None]:
    file: IO[str] | None = None
    with suppress(OSError):  # no locks there, which the main rank has said
        file = path.open("r+", encoding="utf-8")  # NFS gives the whole lock, at the end, to a writer alone
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        _held_files.add(file)
    try:
        yield
    finally:
        if file in _held_files:
            _let_go(file, path)
        elif file is not None:
            file.close()


def _forget() -> None:
    """Close the locks' files. A forked process must: a lock that it inherits would outlive the one that holds it."""
    while _held_files:
        _held_files.pop().close()


os.register_at_fork(after_in_child=_forget)


def move_lock(old: Path, new: Path) -> None:
    """Take a folder's lock along to the one that now has its name.

    Raises:
        OutputError: Another process was there first.
    """
    if not (old / LOCK).is_file():
        return
    new.mkdir(exist_ok=True)
    try:
        place = (new / LOCK).open("x", encoding="utf-8")
    except FileExistsError as error:
        raise OutputError(f"output {new} {_held_by(new / LOCK)}") from error
    # Not a hard link, which some file systems do not have: the place is taken, locked, and then the lock is put there.
    with place:
        place.write((old / LOCK).read_text(encoding="utf-8", errors="replace"))
        place.flush()
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"output {new} {_held_by(new / LOCK)}") from error
        except OSError:  # no locks there: what the file says stands for one
            pass
        os.replace(old / LOCK, new / LOCK)


def _locked(path: Path) -> IO[str]:
    """The lock's file, open and locked."""
    while True:
        file = path.open("a+", encoding="utf-8")
        _lock(file, path, fcntl.LOCK_EX)
        if _is(file, path):  # and not one that its owner has just removed
            break
        file.close()
    left = _owner(path)
    if left and left.get("host") != socket.gethostname():
        logger.warning(
            "the lock of %s was left by process %s on %s, where locks of this machine may not be seen: if that process "
            "still runs, stop one of the two",
            path.parent,
            left["pid"],
            left.get("host"),
        )
    pid = os.getpid()
    about = {"pid": pid, "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    file.truncate(0)
    file.write(json.dumps(about | {"started": _started(pid)}))
    file.flush()
    return file


def _lock(file: IO[str], path: Path, how: int) -> None:
    """Lock, without waiting. Raises :class:`OutputError` where another process was first; the file is closed then."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise OutputError(f"output {path.parent} {_held_by(path)}") from error
    except OSError as error:
        owner = _owner(path)
        if owner.get("pid") != os.getpid() and _runs(owner):
            file.close()
            raise OutputError(f"output {path.parent} {_held_by(path)}") from error
        if how == fcntl.LOCK_SH:
            return  # as was said for the first one
        logger.warning("%s has no file locks (%s): see to it that no other run writes there", path.parent, error)


def _is(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _owner(path: Path) -> dict[str, Any]:
    """What a lock's file says; nothing where it is empty, cut off or not a lock's."""
    try:
        owner = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = isinstance(owner, dict) and isinstance(owner.get("pid"), int) and 0 < owner["pid"] < 2**31
    return owner if known else {}


def _runs(owner: dict[str, Any]) -> bool:
    """Whether the process that a lock names runs on this machine: it, and not another one that got its number."""
    if not owner or owner.get("host") != socket.gethostname():
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return owner.get("started") in (None, _started(owner["pid"]))


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the machine did; None of one that has ended, or where nobody says."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # behind the program's name, which may have spaces and brackets
    return None if state in "ZX" else int(fields[18])


def _held_by(path: Path) -> str:
    owner = _owner(path)
    who = f"process {owner['pid']} on {owner.get('host')}" if owner else "another process"
    if owner and owner.get("host") == socket.gethostname() and not _runs(owner):
        return (
            f"is still held by what {who} has left behind (another rank, a worker), or by a run in another "
            "container: end that, or take another --output"
        )
    since = f", since {owner['since']}" if "since" in owner else ""
    return f"is being written by {who}{since}: wait for its end, stop it, or take another --output"
