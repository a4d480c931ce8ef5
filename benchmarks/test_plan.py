"""What real_fast.plan says of the update's memory, against what it takes."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.machine import PeakMemory
from benchmarks.phases import Phases
from benchmarks.record import append
from benchmarks.steps import OurStep
from benchmarks.workload import Workload, real_workload
from real_fast.memory import ModelSizes, update_memory
from real_fast.model import load_model
from real_fast.packing import micro_batches

BUDGET = 4096


def test_memory_of_the_update(model: Any, tokenizer: Any, scale: Any) -> None:
    """Gradients, moments, copies, activations and head of several micro-batches; the weights are there before."""
    workload = real_workload(tokenizer, scale, 4, 8)
    batches = micro_batches(workload.groups, BUDGET, 0, True)
    largest = max(batches, key=lambda batch: batch.input_ids.numel())
    tokens, rows = largest.input_ids.numel(), len(largest.targets)
    plan = update_memory(ModelSizes.of(model.config), tokens, head_rows=rows)
    expected = plan.total - plan.weights
    # What is imported and allocated once is not the update's.
    OurStep(
        load_model("smollm2-135m", model.device, torch.float32), scale, Workload(workload.groups[:1], ""), BUDGET
    ).step(Phases())
    with PeakMemory() as peak:
        step = OurStep(model, scale, workload, BUDGET, autocast=torch.bfloat16)
        for _ in range(2):
            step.step(Phases())
    assert peak.bytes is not None
    values = {"planned_bytes": (expected, "B"), "peak_bytes": (peak.bytes, "B"), "ratio": (expected / peak.bytes, "1")}
    append("plan", "SmolLM2-135M", "ours", f"tokens={tokens} rows={rows}", values)
    assert 0.85 < expected / peak.bytes < 1.15, values
