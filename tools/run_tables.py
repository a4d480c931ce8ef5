"""Tables of kept runs, out of their summaries in docs/results/."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


def keep(run: Path, name: str, results: Path) -> None:
    """Copy what a table or a page shows of a run to `results`, under this name."""
    results.mkdir(exist_ok=True)
    shutil.copyfile(run / "summary.json", results / f"{name}.json")
    for plot in run.glob("*.png"):
        shutil.copyfile(plot, results / f"{name}-{plot.name}")


def tables(results: Path) -> dict[str, str]:
    """The tables by their markers' names, of the runs that were kept in `results`."""
    runs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))}
    first = {name: run for name, run in runs.items() if name.startswith("quickstart")}
    return {"quickstart": quickstart(first), "measured": measured(runs)}


def pearson(e: dict[str, Any] | None) -> str:
    """Pearson with its interval."""
    if not e or e["pearson"] is None:
        return "-"
    low, high = e["ci95"]["pearson"]
    return f"{e['pearson']:.2f} [{low:.2f}, {high:.2f}]"


def rmse(e: dict[str, Any] | None) -> str:
    """Error in units of the scale."""
    return "-" if not e else f"{e['rmse']:.2f}"


def quickstart(runs: dict[str, dict[str, Any]]) -> str:
    """One row per seed: held-out correlation and error before, after the warm-up and after REAL."""
    lines = [
        "| seed | Pearson before | after warm-up | after REAL | RMSE before | after warm-up | after REAL |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs.values():
        phases = [run["eval"][p] for p in ("before", "warmup", "after")]
        cells = [str(run["seed"]), *map(pearson, phases), *map(rmse, phases)]
        lines.append(f"| {' | '.join(cells)} |")
    n = next(iter(runs.values()))["eval"]["after"]["n"]
    lines.append(f"\nRAIL predictions on {n} held-out rows of unseen categories, 95 % intervals by resampling prompts.")
    return "\n".join(lines)


def measured(runs: dict[str, dict[str, Any]]) -> str:
    """One row per run: where, how long, how much memory, before and after."""
    lines = [
        "| run | rollouts | seconds by phase | rollout tokens/s | peak memory | reward, first → last 3 steps "
        "| held-out Pearson, warm-up → REAL | RMSE |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        seconds = ", ".join(f"{k} {v:.0f}" for k, v in run["seconds"].items())
        e = run["eval"]
        start = e["warmup"] or e["before"]
        lines.append(
            f"| {name} | {run['engine']} | {seconds} (all {sum(run['seconds'].values()):.0f}) "
            f"| {run['rollout_tokens_per_second']:.0f} | {run['peak_memory_gib']:.1f} GiB "
            f"| {run['reward']['first']:.2f} → {run['reward']['last']:.2f} | {pearson(start)} → {pearson(e['after'])} "
            f"| {rmse(start)} → {rmse(e['after'])} |"
        )
    machine = next(iter(runs.values()))["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine.items() if k not in ("device", "threads"))
    lines.append(f"\nMachine: {machine['device']}, {machine['threads']} cores; {versions}.")
    return "\n".join(lines)
