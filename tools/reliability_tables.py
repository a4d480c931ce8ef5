"""Tables of docs/reliability.json, which ``make soak`` writes: faults injected, survived and lost, and the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NONE = "No soak is kept yet: `make soak` writes one."


def tables(docs: Path) -> dict[str, str]:
    """The tables by their markers' names."""
    file = docs / "reliability.json"
    parts: dict[str, Any] = json.loads(file.read_text("utf-8"))["parts"] if file.is_file() else {}
    return {
        "reliability": summary_table(parts),
        "reliability-faults": faults_table(parts),
        "reliability-figures": figures_table(parts),
    }


def summary_table(parts: dict[str, Any]) -> str:
    """A line per part: how much of it ran, on what, and what it came to."""
    if not parts:
        return NONE
    out = ["| part | injected | survived | lost | minutes | of the whole | date |", "|---" * 7 + "|"]
    sums = [0, 0, 0]
    for name, part in parts.items():
        counts = [sum(f["injected"] for f in part["faults"]), sum(f["survived"] for f in part["faults"])]
        counts.append(counts[0] - counts[1])
        sums = [a + b for a, b in zip(sums, counts, strict=True)]
        cells = [name, *(f"{n:,}" for n in counts), f"{part['seconds'] / 60:.0f}", f"{part['share']:.0%}", part["date"]]
        out.append(f"| {' | '.join(cells)} |")
    minutes = sum(part["seconds"] for part in parts.values()) / 60
    out.append(f"| all | {' | '.join(f'{n:,}' for n in sums)} | {minutes:.0f} | | |")
    where = {f"{part['machine']}; {part['versions']}" for part in parts.values()}
    notes = [note for part in parts.values() for note in part["notes"]]
    return "\n".join(out) + "\n\n" + "\n".join(f"Measured on {line}." for line in sorted(where)) + _listed(notes)


def faults_table(parts: dict[str, Any]) -> str:
    """A line per kind of fault."""
    if not parts:
        return NONE
    out = ["| part | fault | injected | survived | lost |", "|---" * 5 + "|"]
    for name, part in parts.items():
        for fault in part["faults"]:
            kind = fault["kind"].removeprefix(f"{name}: ")
            lost = "; ".join(fault["lost"]).replace("|", "\\|").replace("\n", " ") or "0"
            out.append(f"| {name} | {kind} | {fault['injected']:,} | {fault['survived']:,} | {lost} |")
    return "\n".join(out)


def figures_table(parts: dict[str, Any]) -> str:
    """A line per figure that is a number or a few words; curves are in the file alone."""
    if not parts:
        return NONE
    out = ["| part | figure | |", "|---" * 3 + "|"]
    for name, part in parts.items():
        for key, value in part["figures"].items():
            if not key.endswith("seconds:MiB"):
                out.append(f"| {name} | {key} | {_text(value)} |")
    return "\n".join(out)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(one)}" for key, one in value.items())
    if isinstance(value, list):
        return "<br>".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _listed(notes: list[str]) -> str:
    return "\n" + "".join(f"\n- {note}" for note in notes) if notes else ""
