"""Tables of kept runs, out of their summaries in docs/results/."""

from __future__ import annotations

import json
import shutil
from math import hypot
from pathlib import Path
from statistics import mean, stdev
from typing import Any


def keep(run: Path, name: str, results: Path) -> None:
    """Copy what a table or a page shows of a run to `results`, under this name."""
    results.mkdir(exist_ok=True)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    summary["model"] = Path(summary["model"]).name  # not where it lay on this machine
    if (run / "metrics.jsonl").is_file():  # a summary alone has the first and the last updates' rewards
        lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        summary["rewards"] = [m["reward"] for m in lines if m["phase"] == summary["method"]]
    (results / f"{name}.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    for plot in run.glob("*.png"):
        shutil.copyfile(plot, results / f"{name}-{plot.name}")


def tables(results: Path) -> dict[str, str]:
    """The tables by their markers' names, of the runs that were kept in `results`."""
    runs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))}
    first = {name: run for name, run in runs.items() if name.startswith("quickstart")}
    adapted = {name: run for name, run in runs.items() if name.startswith("lora")}
    return {"quickstart": quickstart(first), "measured": measured(runs), "lora": thirds(adapted)}


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


def thirds(runs: dict[str, dict[str, Any]]) -> str:
    """One row per run: the training reward in the first, second and last third of its updates, and every update's."""
    lines = ["| run | first third | second | last | last − first | every update |", "|---|---|---|---|---|---|"]
    for name, run in runs.items():
        rewards = run["rewards"]
        n = len(rewards) // 3
        parts = [rewards[:n], rewards[n : len(rewards) - n], rewards[len(rewards) - n :]]
        means = [mean(part) for part in parts]
        noise = [stdev(part) / len(part) ** 0.5 if len(part) > 1 else 0.0 for part in parts]
        cells = [f"{m:.2f} ± {e:.2f}" for m, e in zip(means, noise, strict=True)]
        cells.append(f"{means[2] - means[0]:+.2f} ± {hypot(noise[0], noise[2]):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(f'{reward:.2f}' for reward in rewards)} |")
    return "\n".join([*lines, "\nMeans over updates, and their standard errors."])


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
