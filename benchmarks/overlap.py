"""What sampling ahead saves and costs: the quickstart with rollout.ahead 0 and 1, rollouts by a server beside it.

real-fast serve --config configs/quickstart.yaml --rollout.engine vllm-server --rollout.url URL    # in another terminal
python -m benchmarks.overlap URL FOLDER [--seeds 3] [--steps N] [--config configs/quickstart.yaml] [--SETTING VALUE ...]

The runs go into FOLDER, the result into FOLDER/overlap.json: seconds of an update (the median behind the first two) and
of its parts, the learning curve, the importance weights, and the evaluations before and after, for each seed and both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from real_fast.train import main as train
from real_fast.utils.jsonio import read_jsonl, write_json

TIMES = ("step_time", "time/rollout", "time/wait", "time/sync", "time/update", "time/optimizer")
CURVES = ("reward", "score/rmse", "score/pearson", "sampling/sampling_logp_difference/mean")
WEIGHTS = tuple(f"sampling/importance_sampling_ratio/{name}" for name in ("mean", "max", "min"))
_FIRST = 2  # updates that are left out of the times: what is compiled and allocated once, and a first batch to wait for


def run(argv: Sequence[str], output: Path) -> dict[str, Any]:
    """One run, and what it measured. Raises :class:`RuntimeError` for one that failed."""
    if status := train([*argv, "--output", str(output)]):
        raise RuntimeError(f"the run {output.name} ended with status {status}: {' '.join(argv)}")
    lines = read_jsonl(output / "metrics.jsonl")
    updates = [line for line in lines if line["phase"] == "real"]
    timed = updates[_FIRST:] or updates
    found: dict[str, Any] = {
        "updates": len(updates),
        "seconds": {name: statistics.median(line[name] for line in timed if name in line) for name in TIMES
                    if any(name in line for line in timed)},
        "mean_length": statistics.mean(line["completions/mean_length"] for line in timed),
        "eval": {line["name"]: line["eval"] for line in lines if line["phase"] == "eval"},
    }  # fmt: skip
    return found | {name: [line.get(name) for line in updates] for name in (*CURVES, *WEIGHTS)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; settings that it does not know are the runs'."""
    parser = argparse.ArgumentParser(prog="benchmarks.overlap", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    args, more = parser.parse_known_args(argv)
    settings = ["--config", args.config, "--rollout.engine", "vllm-server", "--rollout.url", args.url, *more]
    if args.steps:
        settings += ["--train.steps", str(args.steps)]
    result: dict[str, Any] = {**machine(), "settings": settings, "runs": []}
    for seed in range(args.seeds):
        for ahead in (0, 1) if seed % 2 == 0 else (1, 0):  # whatever the machine does meanwhile falls on both
            flags = [*settings, "--seed", str(seed), "--rollout.ahead", str(ahead)]
            found = run(flags, args.folder / f"seed{seed}-ahead{ahead}")
            result["runs"].append({"seed": seed, "ahead": ahead} | found)
            write_json(args.folder / "overlap.json", result)
            print(f"seed {seed}, ahead {ahead}: {found['seconds']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
