"""Memory of an update, planned and measured, as JSON: ``python -m benchmarks.plan_check``, in its own process."""

from __future__ import annotations

import json

import torch

from benchmarks.machine import PeakMemory
from benchmarks.phases import Phases
from benchmarks.steps import OurStep
from benchmarks.workload import Workload, real_workload
from real_fast.batching.micro_batches import micro_batches
from real_fast.model.load import load_model, load_tokenizer
from real_fast.planning.memory import ModelSizes, update_memory
from real_fast.score.scale import ScoreScale

BUDGET = 4096


def main() -> None:
    """Two updates of two micro-batches each with SmolLM2-135M; the weights are there before."""
    tokenizer, device = load_tokenizer("smollm2-135m"), torch.device("cpu")
    scale = ScoreScale.from_tokenizer(tokenizer, [1, 2, 3, 4, 5], "So the overall score is ")
    workload = real_workload(tokenizer, scale, 4, 8)
    largest = max(micro_batches(workload.groups, BUDGET, 0, True), key=lambda batch: batch.input_ids.numel())
    tokens, rows = largest.input_ids.numel(), len(largest.targets)
    # What is imported and allocated once is not the update's.
    first = OurStep(load_model("smollm2-135m", device, torch.float32), scale, Workload(workload.groups[:1], ""), BUDGET)
    first.step(Phases())
    del first
    model = load_model("smollm2-135m", device, torch.float32)
    plan = update_memory(ModelSizes.of(model.config), tokens, head_rows=rows)
    with PeakMemory() as peak:
        step = OurStep(model, scale, workload, BUDGET)
        for _ in range(2):
            step.step(Phases())
    print(json.dumps({"tokens": tokens, "rows": rows, "planned": plan.total - plan.weights, "peak": peak.bytes}))


if __name__ == "__main__":
    main()
