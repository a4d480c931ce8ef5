"""Memory of an update, planned and measured, for every way to train that runs here.

python -m benchmarks.plan_check smollm2-135m FOLDER [...]    each way in a process of its own, into benchmarks.csv
python -m benchmarks.plan_check MODEL "adapters" [...]       the named ways alone; the table takes the newest of each
python -m benchmarks.plan_check --one WAY MODEL              one of them, as JSON

A way's peak is that of two updates, of one micro-batch and of two; the weights are counted, the rest is measured above
them. A process is told to give freed memory back at once (``MALLOC_MMAP_THRESHOLD_``), so that the resident set is what
is alive; what the allocator would keep comes on top, and is no matter of the plan.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, PeakMemory
from benchmarks.record import append

# Settings by the way's name; each is tried with and without activation checkpointing.
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {},
    "adamw8bit": {"name": "adamw8bit"},
    "moments on the host": {"offload": "moments"},
    "all on the host": {"offload": "all"},
    "adapters": {"lora": True},
    "adapters over nf4": {"lora": True, "quantization": "nf4"},
}
AGAIN = ", checkpointing"
# Prompts, rollouts of each, tokens of a prompt and of a response: a group fills a micro-batch.
PROMPTS, K, P, R = 2, 4, 200, 60


def settings(way: str, model: str) -> Any:
    """A way's settings, as of a run."""
    from real_fast.config import Config, LoraConfig

    config, values = Config(model=model, output="unused"), dict(WAYS[way.removesuffix(AGAIN)])
    if values.pop("lora", False):
        config.train.lora = LoraConfig()
    config.optim = replace(config.optim, **{k: v for k, v in values.items() if k in ("name", "offload")})
    train = {k: v for k, v in values.items() if k in ("precision", "quantization")}
    budget = P + K * R
    config.train = replace(
        config.train,
        **({"precision": "bf16"} | train),
        micro_batch_tokens=budget,
        activation_checkpointing=way.endswith(AGAIN),
        device="cpu",
    )
    return config


def measure(way: str, name: str) -> dict[str, Any]:
    """Planned and measured bytes of one way."""
    import torch

    from benchmarks.workload import random_workload
    from real_fast.config.commands import PlanConfig
    from real_fast.distributed.world import ALONE
    from real_fast.methods.base import UpdateCounts
    from real_fast.methods.real import Real
    from real_fast.model.load import load_tokenizer
    from real_fast.planning.memory import ModelSizes, host_memory, update_memory
    from real_fast.planning.need import training_of
    from real_fast.runs.checkpoint import TrainState
    from real_fast.score.scale import ScoreScale
    from real_fast.training.optim import build_optimizer, build_scheduler
    from real_fast.training.setup import load_policy
    from real_fast.training.timer import Timer
    from real_fast.training.update import Updater

    config = settings(way, name)
    scale = ScoreScale.from_tokenizer(load_tokenizer(name), [1, 2, 3, 4, 5], "So the overall score is ")
    policy = load_policy(config, None)
    model, state = policy.model, TrainState()
    weights = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    vocabulary = int(model.config.get_text_config().vocab_size)
    groups = random_workload(vocabulary, scale, PROMPTS, K, P, R).groups
    method = Real(config, lambda _: [], scale)
    optimizer = build_optimizer(model, config.optim)
    scheduler = build_scheduler(optimizer, config.optim, 2)
    updater = Updater(policy, optimizer, scheduler, config.optim, config.train, 0, ALONE, Timer(state.seconds), state)
    tokens = rows = 0

    def update(groups: Sequence[Any]) -> None:
        nonlocal tokens, rows
        counts = UpdateCounts.of(groups)
        policy.train()
        batches = updater.micro_batches(groups)
        for i, batch in enumerate(batches):
            tokens, rows = max(tokens, batch.input_ids.numel()), max(rows, len(batch.targets))
            with updater.accumulate(last=i == len(batches) - 1):
                policy(batch, method.loss(counts, None, False)).loss.backward()
        updater.step()

    # What is imported and allocated once is not the update's.
    torch.zeros(8, 8, dtype=torch.bfloat16) @ torch.zeros(8, 8, dtype=torch.bfloat16)
    with PeakMemory() as peak:
        update(groups[:1])
        update(groups)
    training = replace(training_of(PlanConfig(**vars(config))), device="cpu")
    checkpointing = config.train.activation_checkpointing
    sizes = ModelSizes.of(model.config)
    plan = update_memory(sizes, tokens, training, head_rows=rows, checkpointing=checkpointing)
    held = 4.0 * sizes.parameters if training.offload == "all" else plan.weights
    return {
        "tokens": tokens,
        "rows": rows,
        "weights": weights,
        "planned_weights": held,
        # The host's memory is the device's here.
        "planned": plan.total + host_memory(sizes, training) - held,
        "peak": peak.bytes,
        "parts": vars(plan),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit status 1 if a way's peak is more than 10 % from its plan."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--one"]:
        print(json.dumps(measure(*arguments[1:3])))
        return 0
    every = [way + again for way in WAYS for again in ("", AGAIN)]
    ways = [name for name in arguments if name in every] or every
    models = [name for name in arguments if name not in every] or ["smollm2-135m"]
    return int(not all([record(model, way) for model in models for way in ways]))


def record(model: str, way: str) -> bool:
    """Measure one way and write it down. Returns whether it is within 10 % of the plan."""
    environment = dict(os.environ) | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
    command = [sys.executable, "-m", "benchmarks.plan_check", "--one", way, model]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{model} {way}: {done.stderr.strip().splitlines()[-1]}", flush=True)
        return False
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if found["peak"] is None:
        print("the peak of the resident set cannot be read on this machine")
        return False
    planned, peak = found["planned"] + found["planned_weights"], found["peak"] + found["weights"]
    ratio = planned / peak
    values = {"planned_bytes": (planned, "B"), "peak_bytes": (peak, "B"), "ratio": (ratio, "1")}
    values["above_weights_ratio"] = (found["planned"] / found["peak"], "1")
    name = Path(model).name if Path(model).is_dir() else model
    append("plan", name, way, f"K={K} P={P} R={R} prompts={PROMPTS}", values)
    print(
        f"{name} {way}: planned {planned / 2**30:.2f} GiB, measured {peak / 2**30:.2f}, ratio {ratio:.3f}", flush=True
    )
    return bool(0.9 < ratio < 1.1)


if __name__ == "__main__":
    sys.exit(main())
