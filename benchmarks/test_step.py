"""The update, end to end: reference-style, TRL's, ours, and ours with one idea switched off at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import trl_step
from benchmarks.phases import Phases
from benchmarks.record import append
from benchmarks.steps import VARIANTS, OurStep, ReferenceStep, agreement
from benchmarks.workload import Workload, real_workload
from real_fast.planning.flops import ModelFlops
from real_fast.rollout.engine import publish
from real_fast.rollout.transformers_engine import TransformersEngine
from real_fast.types import SamplingParams

BUDGET = 4096  # tokens per forward pass of ours
# Sequences per forward pass that suit the others best on 2 cores (of 1, 2 and 4 tried): larger logits only cost.
SEQUENCES = {"reference": 1, "trl": 2}
MODEL = "SmolLM2-135M"

# Whose operations real_fast.flops counts.
COUNTED = ("reference", "ours", "no shared prompt")

# Data set, rollouts per prompt, prompts, tokens per response (None: as they come), contenders.
_ALL = ("reference", "trl", *VARIANTS, "ours and rollouts")
_TWO = ("reference", "ours")
CASES = [
    ("vicuna", 8, 1, None, _ALL),
    ("vicuna", 4, 1, None, ("reference", "trl", "ours")),
    ("vicuna", 2, 1, None, ("reference", "trl", "ours")),
    ("topical_chat", 8, 1, 128, _TWO),
    ("mt_bench", 8, 1, 64, _TWO),
]


def _steps() -> list[Any]:
    return [
        pytest.param(case, variant, id=f"{case[0]}-K{case[1]}-R{case[3] or 'x'}-{variant.replace(' ', '-')}")
        for case in CASES
        for variant in case[4]
    ]


class WithRollouts:
    """A whole step: K rollouts a prompt, of the workload's length at most, the update of the workload, the sync."""

    def __init__(self, step: OurStep, engine: TransformersEngine, prompts: list[Any], workload: Workload) -> None:
        self.update, self.engine, self.prompts = step, engine, prompts
        self.sampling = SamplingParams(workload.k, round(workload.response_tokens), seed=1)

    @property
    def body_tokens(self) -> int:
        """Those of the update."""
        return self.update.body_tokens

    def step(self, phases: Phases) -> float:
        """Sample, update, sync."""
        with phases("rollout"):
            self.engine.generate(self.prompts, self.sampling)
        loss = self.update.step(phases)
        with phases("sync"):
            publish(self.engine, self.update.policy.model)
        return loss


def make(variant: str, model: Any, tokenizer: Any, scale: Any, workload: Workload, rounds: int) -> Any:
    """The contender of a name."""
    if variant == "reference":
        return ReferenceStep(model, scale, workload, SEQUENCES[variant])
    if variant == "trl":
        return trl_step.TrlStep(model, tokenizer, workload, SEQUENCES[variant], rounds)
    if variant == "ours and rollouts":
        step = OurStep(model, scale, workload, BUDGET)
        engine = TransformersEngine(model, tokenizer, scale, dtype=torch.bfloat16)
        return WithRollouts(step, engine, [group.prompt_ids for group in workload.groups], workload)
    # Without shared prompts a group is longer than the budget; the padded sequences of one group fill one pass.
    budget = BUDGET if variant != "no shared prompt" else max(len(g.rollouts) * g.longest for g in workload.groups)
    return OurStep(model, scale, workload, budget, variant)  # type: ignore[arg-type]


@pytest.mark.parametrize(("case", "variant"), _steps())
def test_step(case: Any, variant: str, model: Any, tokenizer: Any, scale: Any, measure: Any) -> None:
    """Seconds by phase, samples per second, tokens through the body, peak memory."""
    data, k, prompts, responses, _ = case
    if variant == "trl" and not trl_step.AVAILABLE:
        pytest.skip("trl is not installed: pip install --no-deps -r requirements/bench.txt")
    if variant == "trl":
        _ = trl_step.load().GRPOTrainer  # imported here, outside of what is measured
    from benchmarks.conftest import ROUNDS

    workload = real_workload(tokenizer, scale, prompts, k, data, responses)
    flops = ModelFlops.of(model.config).update(workload.groups, shared_prompt=variant != "no shared prompt")
    measured = measure(lambda: make(variant, model, tokenizer, scale, workload, ROUNDS))
    if variant == "trl":
        measured.contender.close()
    values: dict[str, tuple[float | None, str]] = {
        "peak_bytes": (measured.peak_bytes, "B"),
        "seconds": (measured.seconds, "s"),
        "samples_per_s": (len(workload.rollouts) / measured.seconds, "1/s"),
        "body_tokens": (measured.contender.body_tokens, "tokens"),
    }
    if variant in COUNTED:
        values["flops"] = (flops.reference if variant == "reference" else flops.ours, "FLOP")
    values |= {f"seconds/{name}": (seconds, "s") for name, seconds in measured.phases.items()}
    append("step", MODEL, variant, f"{data} {workload.case}", values)


def test_same_loss_and_gradients(model: Any, scale: Any, tokenizer: Any) -> None:
    """What is timed computes the same thing: in float32, so that it can be told from a rounding difference."""
    workload = real_workload(tokenizer, scale, 1, 4, "vicuna", 48)
    ours = OurStep(model, scale, workload, BUDGET, autocast=None, optimize=False)
    reference = ReferenceStep(model, scale, workload, 2, autocast=None, optimize=False)
    difference, cosine = agreement(ours, reference)
    append(
        "agreement",
        MODEL,
        "ours",
        f"fp32 {workload.case}",
        {"loss_difference": (difference, "relative"), "gradient_cosine": (cosine, "1")},
    )
    assert difference < 1e-3 and cosine > 0.9999
