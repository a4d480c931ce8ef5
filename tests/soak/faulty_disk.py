"""A disk that fails on demand (disk.c), in a process that was started with it preloaded."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LIBRARY = "REAL_FAST_SOAK_DISK"
_SOURCE = Path(__file__).with_name("disk.c")


@dataclass(frozen=True)
class DiskFault:
    """How a disk fails.

    Attributes:
        what: For people.
        error: The errno.
        ops: Operations that can fail so, by disk.c's names.
        stays: All such operations fail from then on, and not the first alone.
        short: The write that fails first writes half, as a disk does that fills up.
    """

    what: str
    error: int
    ops: tuple[str, ...]
    stays: bool = True
    short: bool = False


# What takes room. A rename does where a folder has to grow; an fsync where the room is only looked for then.
_ROOM = ("create", "write", "mkdir", "link", "rename", "allocate", "fsync")
_CHANGES = ("create", "open", "write", "mkdir", "link", "rename", "truncate", "allocate", "unlink")
FAULTS = {
    "full": DiskFault("disk full from there on", errno.ENOSPC, _ROOM),
    "once": DiskFault("disk full for one operation", errno.ENOSPC, _ROOM, stays=False),
    "short": DiskFault("half a write, then disk full", errno.ENOSPC, ("write",), short=True),
    "quota": DiskFault("quota used up from there on", errno.EDQUOT, _ROOM),
    "readonly": DiskFault("read-only from there on", errno.EROFS, _CHANGES),
    "io": DiskFault("I/O error of one operation", errno.EIO, (*_CHANGES, "fsync"), stays=False),
}


def missing() -> str | None:
    """Why the library cannot be had here; None where it can."""
    if sys.platform != "linux":
        return "libc's calls are replaced by LD_PRELOAD, which this system has not"
    return None if shutil.which("cc") else "needs a C compiler, cc"


def preloaded(folder: Path) -> dict[str, str]:
    """The environment of a process whose disk can fail. The library is compiled into a folder."""
    library = folder / "disk.so"
    subprocess.run(
        ["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, _SOURCE, "-ldl", "-lpthread"],
        check=True,
    )
    return {**os.environ, "LD_PRELOAD": str(library), LIBRARY: str(library)}


class Disk:
    """The library in this process.

    Args:
        folder: What lies below it can fail.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._library = ctypes.CDLL(os.environ[LIBRARY])
        self._library.fault_journal.restype = ctypes.c_char_p
        self._library.fault_fired.restype = self._library.fault_fired_at.restype = ctypes.c_long

    @contextmanager
    def watched(self, number: int = -1, fault: DiskFault | None = None) -> Iterator[None]:
        """Note operations; let one fail, where a fault is given: the first it concerns from the `number`-th on."""
        fault = fault or FAULTS["full"]
        ops = " ".join(fault.ops).encode()
        self._library.fault_arm(ctypes.c_long(number), fault.error, int(fault.stays), int(fault.short), ops)
        self._library.fault_folder(os.fsencode(self.folder))
        try:
            yield
        finally:
            self._library.fault_folder(b"")

    @property
    def journal(self) -> list[tuple[str, Path]]:
        """Operations that were noted last: name and path."""
        lines = os.fsdecode(self._library.fault_journal()).splitlines()
        return [(name, Path(path)) for name, _, path in (line.partition(" ") for line in lines)]

    @property
    def fired(self) -> int:
        """How many operations failed."""
        return int(self._library.fault_fired())

    @property
    def fired_at(self) -> int:
        """Which one was the first to fail; -1 for none."""
        return int(self._library.fault_fired_at())
