"""The stages of gpu-check, most important first."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import head, lora_step, record, report
from benchmarks.gpu import attention, card, exact, gpu_tests, head_phases, sanitizer, updates
from benchmarks.gpu.stages import Check, Stage, attempt
from benchmarks.peers import PEERS
from tools import benchmark_tables, gpu_tables

# What ours is timed beside before the peers.
FIRST = (*head.OURS, "eager")


def stages() -> tuple[Stage, ...]:
    """Looked up when asked for, so that a test may put others in the place of their work."""
    return (
        # Of the first five minutes, in one process (the sanitizer's apart).
        Stage("card", 20, card.measure),
        Stage("kernels against float64", 90, exact.run),
        Stage("sanitizer", 50, sanitizer.run),
        Stage("varlen attention", 15, attention.varlen),
        Stage("one update", 45, updates.first),
        Stage("phases of the head", 80, head_phases.run),
        # And then.
        Stage("tests", 170, gpu_tests.run),
        Stage("head, ours and eager", 90, _head),
        Stage("updates", 150, _updates),
        Stage("LoRA step", lora_step.SECONDS, _lora),
        Stage("head, peers", 120, _peers),
        Stage("updates of others", 120, _other_updates),
        Stage("flex attention", 60, attention.flex),
    )


def _head(check: Check, end: float) -> int:
    wrong = head.run(check.device, check.small, end, names=FIRST)
    if check.device.type == "cuda":
        wrong += not attempt(check, "profile of the head", lambda: _profile_head(check))[1]
    return wrong + _report(check, benchmark_tables.heads, gpu_tables.predictions)


def _updates(check: Check, end: float) -> int:
    return updates.pairs(check, end) + _report(check, benchmark_tables.step_table, benchmark_tables.sweep_table)


def _lora(check: Check, end: float) -> int:
    return lora_step.run(check.details, check.small, end - time.monotonic())


def _peers(check: Check, end: float) -> int:
    wrong = head.run(check.device, check.small, end, names=[name for name in PEERS if name not in FIRST])
    return wrong + _report(check, benchmark_tables.heads, gpu_tables.predictions)


def _other_updates(check: Check, end: float) -> int:
    return updates.others(check, end) + _report(check, benchmark_tables.step_table, gpu_tables.predictions)


def _report(check: Check, *tables: Callable[[list[dict[str, str]]], str]) -> int:
    """What is known so far: written, and some of it printed, since the next part may end the command."""

    def write() -> None:
        report.main()
        lines = record.read()
        print("\n\n".join(("", *(table(lines) for table in tables), "")), flush=True)

    return int(not attempt(check, "report", write)[1])


class _Once:
    """A mode of the head at the first shape, as a contender whose step is profiled."""

    def __init__(self, name: str, device: torch.device) -> None:
        hidden, weight, targets = head.timed_inputs(head.shapes(device)[0], device)
        self.loss = head.contenders(device)[name](hidden, weight, targets)

    def step(self, _: Any) -> None:
        self.loss().backward()


def _profile_head(check: Check) -> None:
    """The kernels of the head in each mode."""
    for mode in ("forward", "recompute"):
        contender = _Once(f"ours {mode}", check.device)
        updates.write_profile(check.details / f"profile-head-{mode}.txt", contender, check.device)
    head.timed_inputs.cache_clear()
