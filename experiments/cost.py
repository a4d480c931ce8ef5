"""What it costs to get there: CPU-seconds and sampled tokens until the dev rows' RMSE is low enough."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from experiments.settings import Experiment

Runs = dict[tuple[str, int], dict[str, Any]]


def costs(experiment: Experiment, runs: Runs) -> list[dict[str, Any]]:
    """A line per trained method: what its runs cost in all, and to reach each RMSE of ``experiment.reach``.

    What a run starts from is counted in full, as it has to be trained once. A run gets there at the evaluation on the
    dev rows from which on all are as good. Of several seeds the median, where one that never got there is last; None
    where half of them never did.
    """
    found = []
    for method in experiment.methods:
        mine = {seed: run for (name, seed), run in runs.items() if name == method and run["updates"]}
        if not mine:
            continue
        before = {seed: _starts(experiment, runs, method, seed) for seed in mine}
        line: dict[str, Any] = {"method": method, "runs": len(mine)}
        for key, of_run in {"cpu": "training_cpu_seconds", "tokens": "tokens_sampled", "rows": "rows_seen"}.items():
            line[key] = median(run[of_run] + before[seed][key] for seed, run in mine.items())
        line["reach"] = []
        for limit in experiment.reach:
            there = [
                {key: point[key] + before[seed][key] for key in ("cpu", "tokens", "rows")}
                for seed, run in mine.items()
                if (point := _there(run["curve"], limit))
            ]
            never = [math.inf] * (len(mine) - len(there))
            middle = {key: _finite(median([*(p[key] for p in there), *never])) for key in ("cpu", "tokens", "rows")}
            line["reach"].append({"rmse": limit, "runs": len(there), **middle})
        found.append(line)
    return found


def curves(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    """Every run's evaluations on the dev rows, by its name."""
    return {f"{method}-{seed}": run["curve"] for (method, seed), run in runs.items() if len(run["curve"]) > 1}


def _there(curve: list[dict[str, Any]], limit: float) -> dict[str, Any] | None:
    """The first evaluation from which on all are as good as `limit`."""
    found = None
    for point in reversed(curve):
        if point["rmse"] is None or point["rmse"] > limit:
            break
        found = point
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _starts(experiment: Experiment, runs: Runs, method: str, seed: int) -> dict[str, float]:
    """What the runs that a run starts from cost; those whose files are not here count nothing."""
    known = [runs[start, seed] for start in experiment.starts(method) if (start, seed) in runs]
    keys = {"cpu": "training_cpu_seconds", "tokens": "tokens_sampled", "rows": "rows_seen"}
    return {key: sum(run[of_run] for run in known) for key, of_run in keys.items()}
