"""What an hour of this machine buys: RESULTS/timing.json, from a few updates of every method at its size.

python -m experiments.timing --config experiments/cpu.yaml --results experiments

Seconds are CPU-seconds of processes with a thread each, so that other work on the machine counts little. With --jobs N
that many such seconds pass at a time.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import data
from experiments.launch import Processes, timed, written
from experiments.run import alone_in, opened, parser_of, prepare_data, require_same
from experiments.search import settings_of
from experiments.settings import Experiment, merged
from real_fast.errors import UserError
from real_fast.runs.folder import check_writable
from real_fast.utils.jsonio import read_jsonl, write_json, write_jsonl

PROG = "experiments.timing"
_UPDATES = 4
_ROWS = 64  # graded, each benchmark in proportion


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 1 if a run failed, 2 for a mistake of the user's."""
    args = parser_of(PROG, "Measure what the runs will take.").parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        experiment, folder = opened(args)
        results = args.results or folder / "results"
        for place in (folder, results):
            check_writable(place)
        with alone_in(folder):
            require_same(experiment, folder)
            prepare_data(experiment, args.data.expanduser(), folder)
            lines = []
            for method in args.methods or experiment.methods:
                lines.append(measured(experiment, method, folder))
                write_json(results / "timing.json", lines)
                print(table(lines[-1:], args.jobs), file=sys.stderr, flush=True)
        print(table(lines, args.jobs))
    except (UserError, OSError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def measured(experiment: Experiment, method: str, folder: Path) -> dict[str, Any]:
    """Seconds of an update and of a graded row of a method, and what its runs will take by these.

    Raises:
        OSError: The run failed; the message names its log.
    """
    scratch = folder / "timing"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    config = experiment.config(method, experiment.seeds[0], folder)
    plan = settings_of(experiment, method)
    updates, stages = plan.train.steps, plan.supervised.stages if plan.method == "tract" else 1
    graded = {name: read_jsonl(folder / "data" / f"test-{name}.jsonl") for name in experiment.graded_on(method)}
    tests = sum(map(len, graded.values()))
    rows = {name: data.limited(some, max(1, round(_ROWS * len(some) / tests))) for name, some in graded.items()}
    for name, some in rows.items():
        write_jsonl(scratch / f"{name}.jsonl", some)
    short = {
        "init_from": None,
        "output": str(scratch / "run"),
        "train": {"steps": min(updates, _UPDATES)},
        "data": {"eval": {name: str(scratch / f"{name}.jsonl") for name in rows}},
        "eval": {"every": 0, "bootstrap": 1},
    }
    if plan.method == "tract":  # its stages do the same work, and the second one needs a first
        short["supervised"] = {"stages": 1}
    file, log, spent_file = written(scratch, method, merged(config, short)), scratch / "log", scratch / "cpu.jsonl"
    command = [sys.executable, "-m", "real_fast.train", "--config", str(file)]
    if status := timed("train", command, log, spent_file, Processes(1)):
        raise OSError(f"{method} failed with status {status}: see {log}")
    (spent,) = read_jsonl(spent_file)
    rate = spent["cpu"] / spent["wall"]
    metrics = read_jsonl(scratch / "run" / "metrics.jsonl")
    steps = [line["step_time"] for line in metrics if line["phase"] == plan.method][1:]
    seconds = next(line["eval"]["seconds"] for line in metrics if line.get("name") == "after")
    update = rate * statistics.median(steps) if steps else 0.0
    row = rate * seconds / sum(map(len, rows.values()))
    start = max(0.0, spent["cpu"] - rate * (sum(steps) + seconds) - update)
    every = plan.eval.every
    dev = sum(len(read_jsonl(Path(name))) for name in config["data"]["eval"].values())
    evaluated = stages * dev * max(1, updates // every if every else 1) + tests
    runs = experiment.seeds_of(method)
    one = stages * (start + updates * update) + start + evaluated * row
    sampled = sum(sum(experiment.feedbacks(method, seed)) for seed in runs) * experiment.data.averaged_rows
    return {
        "method": method,
        "update": update,
        "row": row,
        "start": start,
        "updates": stages * updates,
        "rows": evaluated,
        "runs": len(runs),
        "run": one,
        "all": len(runs) * one + sampled * len(experiment.primary.benchmarks) * row,
    }


def table(lines: Sequence[dict[str, Any]], jobs: int) -> str:
    """What people read."""
    found = [
        "| method | CPU-s an update | updates an hour | CPU-s a graded row | updates of a run | CPU-min a run | runs "
        "| CPU-hours |",
        "|---|" + "---|" * 7,
    ]
    for line in lines:
        hour = f"{3600 / line['update']:.0f}" if line["update"] else "-"
        found.append(
            f"| `{line['method']}` | {line['update']:.2f} | {hour} | {line['row']:.3f} | {line['updates']} "
            f"| {line['run'] / 60:.0f} | {line['runs']} | {line['all'] / 3600:.1f} |"
        )
    total = sum(line["all"] for line in lines) / 3600
    return "\n".join([*found, "", f"In all {total:.1f} CPU-hours, {total / jobs:.1f} hours with --jobs {jobs}."])


if __name__ == "__main__":
    sys.exit(main())
