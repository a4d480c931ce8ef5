"""Runs stages one after the other: one that fails is said and hides none behind it; results are packed after each."""

from __future__ import annotations

import gc
import io
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from benchmarks.gpu.archive import pack

LEAST = 1.0  # seconds under which no stage is begun


@dataclass
class Check:
    """What a run knows.

    Attributes:
        out: Folder of the results: archive, what was printed, benchmarks.csv, summary.json, figures.
        details: Folder of what only the archive holds: logs of processes, profiles, tracebacks.
        device: Where everything runs.
        small: Tiny shapes, on any device.
        end: When all must be done, by ``time.monotonic``.
        attention: Backend for shared prompts.
        peak: What the machine reaches at best; None until it has been measured.
        failed: Names of the stages in which something went wrong.
        left_out: Of those for which no time was left.
    """

    out: Path
    details: Path
    device: Any
    small: bool
    end: float
    attention: str = "auto"
    peak: Any = None
    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


class Stage(NamedTuple):
    """A part of the run.

    Attributes:
        name: For people.
        seconds: That it may take at most.
        work: Given the check and when to end by ``time.monotonic``, returns how many things went wrong.
    """

    name: str
    seconds: float
    work: Callable[[Check, float], int]


class _Both(io.TextIOBase):
    """What is printed, and the same in a file, at once."""

    def __init__(self, *files: TextIO) -> None:
        self.files = files

    def write(self, text: str) -> int:
        for file in self.files:
            file.write(text)
            file.flush()
        return len(text)


def run(check: Check, stages: Sequence[Stage]) -> int:
    """Run those that fit into the time, in order. Exit status 1 if something went wrong in one."""
    with (check.out / "gpu-check.txt").open("w", encoding="utf-8") as file, redirect_stdout(_Both(sys.stdout, file)):
        started = time.monotonic()
        for number, stage in enumerate(stages, 1):
            now = time.monotonic()
            head = f"== {number} of {len(stages)}, {stage.name}"
            if check.end - now < LEAST:
                print(f"{head}: left out, no time is left")
                check.left_out.append(stage.name)
                continue
            print(f"{head}, {now - started:.0f} s after the start")
            if _wrong(check, stage, min(check.end, now + stage.seconds)):
                check.failed.append(stage.name)
            gc.collect()
            pack(check.out, (check.out, check.details))
        print(f"== done after {time.monotonic() - started:.0f} s" + _summary(check))
        pack(check.out, (check.out, check.details))
    return int(bool(check.failed))


def attempt(check: Check, what: str, work: Callable[[], Any]) -> tuple[Any, bool]:
    """One part of a stage: its result, and whether it ended without an error, which is said, its traceback kept."""
    try:
        return work(), True
    except Exception as error:  # whatever goes wrong in a part, the others are worth having
        print(f"{what} failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        with (check.details / "errors.txt").open("a", encoding="utf-8") as file:
            file.write(f"{what}:\n{traceback.format_exc()}\n")
    gc.collect()  # what the traceback held
    return None, False


def _wrong(check: Check, stage: Stage, end: float) -> bool:
    wrong, whole = attempt(check, stage.name, lambda: stage.work(check, end))
    return not whole or bool(wrong)


def _summary(check: Check) -> str:
    text = f"; something went wrong in: {', '.join(check.failed)}" if check.failed else "; nothing went wrong"
    return text + (f"; left out: {', '.join(check.left_out)}" if check.left_out else "")
