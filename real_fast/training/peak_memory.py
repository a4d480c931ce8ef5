"""How much memory the phases of an update take, with the rollout engine beside the trainer."""

from __future__ import annotations

from pathlib import Path

import torch

GIB = 2**30
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Most memory in use from one mark to the next.

    On CUDA what the driver counts at the mark, whoever holds it: the context, vLLM, and what the trainer's allocator
    took at its peak, which it keeps until vLLM wakes. On a CPU the peak of the process's resident set, which Linux
    counts and lets be reset; where it does not, nothing.

    Args:
        device: The trainer's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """A phase has ended; "" for one that is not reported."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            peak: int | None = total - free
        else:
            peak = _peak_resident()
        if phase and peak is not None:
            self.found[f"memory/{phase}_gib"] = peak / GIB

    def metrics(self, held: int, asleep: bool) -> dict[str, float]:
        """Of the update so far, in GiB.

        Args:
            held: Bytes that the rollout engine holds while it is awake.
            asleep: Whether it slept during the update.
        """
        engine = {"memory/engine_gib": held / GIB, "memory/engine_update_gib": 0.0 if asleep else held / GIB}
        return self.found | engine


def _peak_resident() -> int | None:
    """Bytes; the count starts anew behind it."""
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        _RESET.write_text("5")
    except (OSError, StopIteration):  # not Linux, or a locked-down container
        return None
    return int(line.split()[1]) * 1024
