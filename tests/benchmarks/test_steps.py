"""What is timed computes the same thing: every contender's loss and gradients, on a tiny model in float32."""

from __future__ import annotations

import pytest

from benchmarks.gpu.cases import SMALL, five_scores
from benchmarks.phases import Phases
from benchmarks.steps import VARIANTS, OurStep, ReferenceStep, agreement
from benchmarks.workload import random_workload

CASE = SMALL[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sequences", [1, 3])
def test_loss_and_gradients_agree(variant, sequences):
    model, scale = CASE.model("cpu"), five_scores()
    workload = random_workload(CASE.vocabulary, scale, CASE.prompts, CASE.k, CASE.p, CASE.r)
    ours = OurStep(model, scale, workload, 512, variant, autocast=None, optimize=False)
    reference = ReferenceStep(model, scale, workload, sequences, autocast=None, optimize=False)
    difference, cosine = agreement(ours, reference)
    assert difference < 1e-3 and cosine > 0.9999


def test_phases_add_up_to_the_step():
    model, scale = CASE.model("cpu"), five_scores()
    workload = random_workload(CASE.vocabulary, scale, CASE.prompts, CASE.k, CASE.p, CASE.r)
    step, phases = OurStep(model, scale, workload, 512), Phases()
    step.step(phases)
    assert set(phases.seconds) == {"pack", "head", "body forward", "backward", "optimizer"}
    assert all(seconds > 0 for seconds in phases.seconds.values())
    assert step.body_tokens == sum(group.shared_tokens for group in workload.groups)
    assert all(p.grad is None for p in model.parameters())
