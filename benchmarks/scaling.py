"""Updates on one CPU rank and on several, a thread each: what sharding costs and gains where both can be run.

python -m benchmarks.scaling                     a tiny model and SmolLM2 on 1 and 2 ranks, into results/scaling.json
python -m benchmarks.scaling --ranks 1 2 4       other numbers of ranks; "--models tiny" a part; "--output FILE"
python -m benchmarks.scaling --rank FOLDER ...   one rank of them: real-fast train with these arguments, its peak noted

Each case is a run of ``real-fast train`` of its own, by torchrun where it has several ranks, with the same rows, seed
and settings. The first update, which allocates what the others use again, is not counted. A rank's peak is that of its
resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.machine import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
UPDATES = 5
# A case that hangs must end.
LIMIT_S = 1200
MODELS = ("tiny", "smollm2-135m")
SETTINGS = {
    "data.train": "synthetic:train",
    "data.eval": "synthetic:eval",
    "data.max_eval": 4,
    "data.max_train": 200,
    "prompt.template": "short",
    "prompt.max_tokens": 1024,
    "scale.phrase": "Score: ",
    "rollout.engine": "transformers",
    "rollout.prompts_per_step": 8,
    "rollout.group_size": 4,
    "rollout.max_tokens": 32,
    "rollout.check_every": 0,
    "train.steps": UPDATES,
    "train.device": "cpu",
    "train.precision": "fp32",
    "eval.on_start": "false",
    "eval.bootstrap": 10,
    "save.every": 0,
    "objective.kl_every": 0,
    "log_level": "warning",
}


def case(model: str, ranks: int, folder: Path) -> dict[str, Any]:
    """Run one and read what it says of itself.

    Args:
        model: One of MODELS.
        ranks: How many processes.
        folder: An empty one, for the model, the run and the peaks.

    Returns:
        Its seconds, tokens and peaks.

    Raises:
        RuntimeError: The run failed, or took longer than LIMIT_S; the message has its last lines.
    """
    # A group of the tiny model's, of a token a letter, takes some 1,000 tokens.
    settings = {**SETTINGS, "model": _model(model, folder), "output": folder / "run"}
    settings["train.micro_batch_tokens"] = 1400 if model == "tiny" else 600
    launch = [sys.executable, "-m"]
    if ranks > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command = [*launch, "benchmarks.scaling", "--rank", str(folder)]
    command += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{model} on {ranks} ranks took longer than {LIMIT_S} s") from error
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-12:])
        raise RuntimeError(f"{model} on {ranks} ranks ended with status {done.returncode}:\n{last}")
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    counted = [line for line in lines if line["phase"] == "real"][1:]
    update, tokens = mean(x["time/update"] for x in counted), mean(x["body/tokens"] for x in counted)
    return {
        "model": model,
        "ranks": ranks,
        "step": mean(x["step_time"] for x in counted),
        "update": update,
        "rollout": mean(x["time/rollout"] for x in counted),
        "tokens": tokens,
        "tokens_per_second": tokens / update,
        "reward": [x["reward"] for x in counted],
        "peaks": [int((folder / f"peak-{rank}").read_text()) for rank in range(ranks)],
    }


def _model(name: str, folder: Path) -> str:
    """What ``model`` is set to; the tiny one is written, with random weights, the same each time."""
    if name != "tiny":
        return name
    import torch

    from benchmarks.gpu.cases import Case
    from benchmarks.random_model import write_model

    shape = Case("tiny", 256, 4, 4, 512, tied=False, vocabulary=512, kv_heads=2, head_dim=64)
    write_model(folder / "model", shape, torch.device("cpu"))
    return str(folder / "model")


def rank(folder: Path, arguments: list[str]) -> int:
    """Train, and note this process's peak. Returns the exit status."""
    from real_fast.commands import main as real_fast

    status = real_fast(["train", *arguments])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / f"peak-{os.environ.get('RANK', '0')}").write_text(str(peak))
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit status 1 if a run failed; nothing is written then."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--rank"]:
        return rank(Path(arguments[1]), arguments[2:])
    parser = argparse.ArgumentParser(prog="benchmarks.scaling")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    found = []
    for model in options.models:
        for ranks in options.ranks:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found.append(case(model, ranks, Path(folder)))
                except RuntimeError as error:
                    print(error, file=sys.stderr)
                    return 1
            last = found[-1]
            print(f"{model}, {ranks} ranks: {last['step']:.2f} s a step, {last['tokens_per_second']:.0f} tokens/s")
    report = {"machine": _machine(), "updates": UPDATES - 1, "settings": SETTINGS, "cases": found}
    options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def _machine() -> dict[str, str]:
    """Where this was measured, in which a rank has one thread."""
    import torch

    from benchmarks.machine import machine

    torch.set_num_threads(1)
    return machine() | {"cores": str(os.cpu_count())}


if __name__ == "__main__":
    sys.exit(main())
