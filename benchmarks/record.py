"""One long-format CSV for every benchmark: a line per number, with what it was measured on."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.machine import machine

RESULTS = Path(os.environ.get("REAL_FAST_RESULTS") or Path(__file__).resolve().parent / "results")
# Ratios are taken within one run alone.
RUN = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
COLUMNS = (
    "run",
    "commit",
    "device",
    "machine",
    "versions",
    "suite",
    "model",
    "variant",
    "case",
    "metric",
    "value",
    "unit",
)


def append(suite: str, model: str, variant: str, case: str, values: Mapping[str, tuple[float | None, str]]) -> None:
    """Add one line per metric to ``benchmarks.csv``.

    Args:
        suite: Which benchmark, such as "step".
        model: Which model or shape.
        variant: Which implementation, such as "ours" or "trl".
        case: The other parameters as "K=8 P=1000 R=115", in that order everywhere.
        values: Metric to (value, unit); one whose value is None could not be measured here and gets no line.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "benchmarks.csv"
    fixed = {"run": RUN, **machine()}
    fixed |= {"suite": suite, "model": model, "variant": variant, "case": case}
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for metric, (value, unit) in values.items():
            if value is None:
                continue
            writer.writerow({**fixed, "metric": metric, "value": f"{value:.6g}", "unit": unit})


def append_absence(suite: str, name: str, reason: str, model: str = "-") -> None:
    """Add a line that says that a contender did not run, at one shape or at all, and why."""
    append(absent(suite), model, name, reason, {"left_out": (1.0, "1")})


def absent(suite: str) -> str:
    """The suite of such lines."""
    return f"{suite} left out"


def read(path: Path | None = None) -> list[dict[str, str]]:
    """All lines, oldest first."""
    with (path or RESULTS / "benchmarks.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def add(source: Path, target: Path) -> int:
    """Add the lines of a file that another one does not have yet. Returns how many.

    Raises:
        OSError: One of the files is not there.
        ValueError: The source has other columns.
    """
    there, new = read(target), read(source)
    if new and tuple(new[0]) != COLUMNS:
        raise ValueError(f"{source}: its columns are {', '.join(new[0])}, not {', '.join(COLUMNS)}")
    known = {tuple(line.values()) for line in there}
    added = [line for line in new if tuple(line.values()) not in known]
    with target.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(added)
    return len(added)
