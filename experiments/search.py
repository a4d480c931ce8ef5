"""The learning rate of every method, searched on the dev rows with the same budget: RESULTS/search.json.

python -m experiments.search --config experiments/cpu.yaml --results experiments --methods sft raft tract

The rates under ``search`` are tried on one seed; the lowest RMSE on the dev rows wins, the mean over their benchmarks.
No held-out row is graded. The YAML file is yours to change: the rate that it has and the best one are printed. Search
what a method starts from first.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments.launch import run_all, train_one
from experiments.run import alone_in, opened, parser_of, prepare_data, reported, require_same
from experiments.settings import Experiment, merged, run_folder
from real_fast.config import Config, cli
from real_fast.errors import ConfigError
from real_fast.runs.folder import check_writable
from real_fast.utils.jsonio import write_json

PROG = "experiments.search"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 1 if a run failed, 2 for a mistake of the user's, 130 for Ctrl-C."""
    parser = parser_of(PROG, "Search learning rates on the dev rows.")
    args = parser.parse_args(argv)

    def work(failed: list[str]) -> None:
        experiment, folder = opened(args)
        results = args.results or folder / "results"
        methods = args.methods or list(experiment.search.lr)
        if unknown := [m for m in methods if m not in experiment.search.lr]:
            raise ConfigError(f"--methods {unknown[0]}: {args.config} has no rates for it under search.lr")
        for place in (folder, results):
            check_writable(place)
        trials, given = trial_experiment(experiment, methods)
        with alone_in(folder):
            require_same(experiment, folder)
            prepare_data(experiment, args.data.expanduser(), folder)
            run_all(trials, needed(trials, given, folder), partial(train_one, trials, folder), failed, args.jobs)
        print(write(experiment, trials, given, folder, results / "search.json"))

    return reported(PROG, work)


def trial_experiment(experiment: Experiment, methods: Sequence[str]) -> tuple[Experiment, dict[str, tuple[str, float]]]:
    """An experiment of one seed: a method for every rate, and what they start from; and the trials' method and rate."""
    trials: dict[str, dict[str, Any]] = {}
    given: dict[str, tuple[str, float]] = {}
    for method in methods:
        for start in reversed(experiment.starts(method)):
            trials[start] = {**experiment.methods[start], "seeds": experiment.seeds[:1]}
        own = experiment.methods[method]
        settings, share = settings_of(experiment, method), experiment.search.share
        short = {
            "train": {"steps": max(1, round(settings.train.steps * share))},
            "optim": {"lr_warmup_steps": round(settings.optim.lr_warmup_steps * share)},
            "eval": {"every": 0},
            "seeds": experiment.seeds[:1],
        }
        for rate in experiment.search.lr[method]:
            name = f"{method}_lr{rate:g}"
            trials[name] = merged(own, merged(short, {"optim": {"lr": rate}}))
            given[name] = method, rate
    return replace(experiment, seeds=experiment.seeds[:1], methods=trials), given


def settings_of(experiment: Experiment, method: str) -> Config:
    """Settings of a method's first run, with what real_fast.train takes where nothing is given."""
    config: Config = cli.from_namespace(Config, experiment.config(method, experiment.seeds[0], Path()))
    return config


def needed(trials: Experiment, given: dict[str, tuple[str, float]], folder: Path) -> list[tuple[str, int]]:
    """Trials that are not done, and the starts that these need and that are not here."""
    left = [run for run in trials.order() if not (run_folder(folder, *run) / "summary.json").is_file()]
    starts = {start for method, _ in left if method in given for start in trials.starts(method)}
    return [run for run in left if run[0] in given or run[0] in starts]


def write(
    experiment: Experiment, trials: Experiment, given: dict[str, tuple[str, float]], folder: Path, file: Path
) -> str:
    """Add the finished trials to the file, without their weights from then on; returns what people read."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, (method, rate) in given.items():
        run = run_folder(folder, name, trials.seeds[0])
        if not (run / "summary.json").is_file():
            continue
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        after = summary["eval"]["after"]
        each = {b: {"rmse": s["rmse"], "pearson": s["pearson"]} for b, s in after["benchmarks"].items()}
        line = {"lr": rate, "updates": summary["steps"], "rmse": after["rmse"], "pearson": after["pearson"]}
        lines = [old for old in known.get(method, []) if old["lr"] != rate] + [{**line, "benchmarks": each}]
        known[method] = sorted(lines, key=lambda one: float(one["lr"]))
        shutil.rmtree(run / "final", ignore_errors=True)
    write_json(file, known)
    said = []
    for method, lines in known.items():
        tried = ", ".join(f"{one['lr']:g}: {one['rmse']:.3f}" for one in lines if one["rmse"] is not None)
        has = f"{settings_of(experiment, method).optim.lr:g}" if method in experiment.methods else "no such method"
        said.append(f"{method}: dev RMSE {tried}; best {best(lines):g}, and the YAML file has {has}")
    return "\n".join(said)


def best(lines: Sequence[dict[str, Any]]) -> float:
    """The rate with the lowest RMSE on the dev rows."""
    return float(min(lines, key=lambda one: float("inf") if one["rmse"] is None else one["rmse"])["lr"])


if __name__ == "__main__":
    sys.exit(main())
