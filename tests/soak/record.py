"""What a part of the soak found, and docs/reliability.json, where each part writes its own section."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, machine
from real_fast.utils.jsonio import clean, write_json

RESULT = ROOT / "docs" / "reliability.json"


@dataclass
class Fault:
    """One kind of fault.

    Attributes:
        kind: What was done, as a row of the table says it ("kill -9 in a checkpoint, one process").
        injected: How often.
        survived: How often nothing was lost: what that means, the part's docstring says.
        lost: What it did to the others, a line each, with what it takes to do it again (a seed, a place).
    """

    kind: str
    injected: int = 0
    survived: int = 0
    lost: list[str] = field(default_factory=list)

    def count(self, problem: str | None) -> None:
        """One more; `problem` is what was lost, None for nothing."""
        self.injected += 1
        if problem is None:
            self.survived += 1
        else:
            self.lost.append(problem)


@dataclass
class Found:
    """What a part found.

    Attributes:
        faults: By kind.
        figures: What else it measured, by what the page calls it: numbers, texts, or lists for a plot.
        notes: Sentences for the page: what was left out, and why.
    """

    faults: list[Fault] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def lost(self) -> list[str]:
        """All that was lost."""
        return [line for fault in self.faults for line in fault.lost]


def keep(part: str, found: Found, seconds: float, share: float, path: Path = RESULT) -> None:
    """Write a part's section, with when and on what it ran; those of other parts stay."""
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"parts": {}}
    report["parts"][part] = {
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
        "share": share,
        **machine(),
        **clean(asdict(found)),
    }
    write_json(path, report)


def by_kind(outcomes: Iterable[tuple[str, str | None]]) -> list[Fault]:
    """Faults from single outcomes: the kind, and what was lost."""
    faults: dict[str, Fault] = {}
    for kind, problem in outcomes:
        faults.setdefault(kind, Fault(kind)).count(problem)
    return list(faults.values())
