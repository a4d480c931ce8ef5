"""What real_fast.plan says of the update's memory, against what it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks.machine import ROOT
from benchmarks.record import append


@pytest.mark.parametrize("variant", ["in use", "held by glibc"])
def test_memory_of_the_update(variant: str) -> None:
    """Gradients, moments, copies, activations and head of several micro-batches.

    "in use": glibc gives freed tensors back at once, so the resident set is what is alive. By default it keeps part of
    them, which comes on top and is no matter of the plan.
    """
    environment = dict(os.environ)
    if variant == "in use":
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**17)
    command = [sys.executable, "-m", "benchmarks.plan_check", "--one", "bf16", "smollm2-135m"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if found["peak"] is None:
        pytest.skip("the peak of the resident set cannot be read on this machine")
    ratio = found["planned"] / found["peak"]
    values = {"planned_bytes": (found["planned"], "B"), "peak_bytes": (found["peak"], "B"), "ratio": (ratio, "1")}
    append("plan", "SmolLM2-135M", variant, f"tokens={found['tokens']} rows={found['rows']}", values)
    if variant == "in use":
        assert 0.9 < ratio < 1.1, values
