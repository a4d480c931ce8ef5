"""One run by one process and by several CPU ranks: the same rollouts, the same curve, the same judge, or not.

python -m benchmarks.same_run FOLDER [--ranks 1 2] [--config configs/quickstart.yaml] [--SETTING VALUE ...]

In float32, where ranks may differ by sums in another order alone; in bf16 other batches round otherwise, and another
token is sampled now and then. The runs go into FOLDER, which keeps those that are there, the result into
benchmarks/results/same_run.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, machine
from real_fast.utils.jsonio import read_jsonl, write_json

RESULT = ROOT / "benchmarks" / "results" / "same_run.json"
SETTINGS = {
    "train.precision": "fp32",
    "train.device": "cpu",
    "rollout.log_every": 1,
    "rollout.log_prompts": 10**6,
    "log_level": "warning",
}
EVALUATIONS = ("before", "warmup", "after")


def launch(ranks: int, folder: Path, config: str, more: Sequence[str]) -> None:
    """Make the run in a folder, if it is not there, with a thread a rank: by torchrun with more ranks than one.

    Raises:
        RuntimeError: It failed.
    """
    if (folder / "summary.json").is_file():
        return
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command += ["real_fast.train", "--config", config, "--output", str(folder), "--overwrite"]
    command += [word for key, value in SETTINGS.items() for word in (f"--{key}", str(value))]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([*command, *more], cwd=ROOT, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"the run on {ranks} ranks ended with status {done.returncode}")


def result(ranks: int, folder: Path) -> dict[str, Any]:
    """What a run came to: its evaluations with their intervals, and its curves."""
    lines = read_jsonl(folder / "metrics.jsonl")
    updates = [line for line in lines if line["phase"] not in ("warmup", "eval")]
    evaluations = {line["name"]: line["eval"] for line in lines if line["phase"] == "eval"}
    return {
        "ranks": ranks,
        "updates": len(updates),
        "eval": {
            name: {"n": e["n"], **{key: [e[key], *e["ci95"][key]] for key in ("pearson", "spearman", "rmse")}}
            for name, e in evaluations.items()
        },
        "reward": [line["reward"] for line in updates],
        "loss": [line["loss"] for line in updates],
        "warmup_loss": [line["loss"] for line in lines if line["phase"] == "warmup"],
    }


def difference(one: Path, other: Path) -> dict[str, Any]:
    """How far a run is from another one.

    Returns:
        Rollouts with the same text and how many there are, the first update in which one differs, and the largest
        difference of a held-out prediction (in points of the score), by evaluation.
    """
    first, second = (
        {(x["step"], x["id"], x["rollout"]): x["text"] for x in read_jsonl(folder / "rollouts.jsonl")}
        for folder in (one, other)
    )
    parted = [key[0] for key in first if second.get(key) != first[key]]
    predictions = {}
    for name in EVALUATIONS:
        pairs = [
            {row["id"]: row["prediction"] for row in read_jsonl(folder / "eval" / f"{name}.predictions.jsonl")}
            for folder in (one, other)
        ]
        predictions[name] = max(abs(pairs[0][row] - pairs[1][row]) for row in pairs[0])
    return {
        "rollouts": len(first),
        "same_texts": len(first) - len(parted),
        "parted": min(parted, default=None),
        "largest_difference": predictions,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; settings that it does not know are the runs'."""
    parser = argparse.ArgumentParser(prog="benchmarks.same_run", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--output", type=Path, default=RESULT)
    args, more = parser.parse_known_args(argv)
    folders = {ranks: args.folder / f"ranks-{ranks}" for ranks in args.ranks}
    for ranks, folder in folders.items():
        launch(ranks, folder.resolve(), args.config, more)
    one = folders[args.ranks[0]]
    report = {
        **machine(),
        "config": args.config,
        "settings": {key: str(value) for key, value in SETTINGS.items()} | {"more": more},
        "runs": [
            result(ranks, folder) | ({} if folder == one else difference(one, folder))
            for ranks, folder in folders.items()
        ],
    }
    write_json(args.output, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
