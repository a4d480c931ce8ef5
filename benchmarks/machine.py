"""What a measurement was made on, and how much memory it took."""

from __future__ import annotations

import ctypes
import gc
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

from real_fast.utils.machine import cpu_instructions, cpu_name, versions

ROOT = Path(__file__).resolve().parent.parent


@cache
def machine() -> dict[str, str]:
    """The columns of a measurement that say where and with what it was made."""
    found = versions("torch", "transformers", "triton", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")
    listed = [f"python {platform.python_version()}", *(f"{name} {version}" for name, version in found.items())]
    if torch.cuda.is_available():
        device, where = "cuda", torch.cuda.get_device_name()
        listed.append(f"cuda {torch.version.cuda}")
    else:
        device, where = "cpu", f"{cpu_name()} ({cpu_instructions()}), {torch.get_num_threads()} threads"
    return {"commit": _commit(), "device": device, "machine": where, "versions": ", ".join(listed)}


def _commit() -> str:
    if shutil.which("git") is None:
        return "unknown"
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return "unknown"
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def synchronize() -> None:
    """Wait for the device, so that a clock read afterwards means something."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class PeakMemory:
    """Context manager: ``bytes`` is the most memory in use inside, above what was in use at its start.

    On CUDA by the allocator's own counter. On the CPU by the resident set (Linux), whose high-water mark is reset at
    the start; None elsewhere, and where that is not allowed.
    """

    bytes: int | None = None
    _before: int = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
            try:
                Path("/proc/self/clear_refs").write_text("5")
                self._before = _status("VmRSS")
            except OSError:  # a locked-down container
                self._before = 0
        return self

    def __exit__(self, *_: object) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated() - self._before
        elif sys.platform == "linux" and self._before:
            self.bytes = _status("VmHWM") - self._before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
