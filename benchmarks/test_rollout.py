"""Rollouts: sampled tokens per second, K per prompt, by us and by Transformers' own generate."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.machine import PeakMemory
from benchmarks.record import append
from benchmarks.workload import real_workload
from real_fast.attention.support import enable
from real_fast.rollout import prefill
from real_fast.rollout.transformers_engine import TransformersEngine
from real_fast.types import SamplingParams

K, PROMPTS, TOKENS = 8, 2, 48
AT_ONCE = K * PROMPTS
# Of the prompts of as many answers to one question that are graded, the share that is the question.
QUESTION = 0.75


class Engine:
    """Our engine: `n` samples of a prompt share its prefill; `beginnings`: so do prompts that begin alike."""

    def __init__(self, model: Any, tokenizer: Any, scale: Any, prompts: list[Any], n: int, beginnings: bool) -> None:
        enable(model, "sdpa")
        self.engine = TransformersEngine(model, tokenizer, scale, max_num_seqs=AT_ONCE, dtype=torch.bfloat16)
        self.prompts, self.n, self.beginnings = prompts, n, beginnings

    def run(self) -> int:
        """Sample, and count the tokens."""
        with nullcontext() if self.beginnings else mock.patch.dict(prefill._WORTHWHILE, cpu=10**9):
            rollouts = self.engine.generate(self.prompts, SamplingParams(self.n, TOKENS, seed=1))
        return sum(len(r.sampled_ids) for group in rollouts for r in group)


class Generate:
    """``model.generate`` with num_return_sequences, in bf16; it gives no score and appends no phrase."""

    def __init__(self, model: Any, tokenizer: Any, prompts: list[Any]) -> None:
        self.model, self.tokenizer, self.prompts = model.to(torch.bfloat16).eval(), tokenizer, prompts

    def run(self) -> int:
        """Sample, and count the tokens."""
        longest = max(map(len, self.prompts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in self.prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in self.prompts])
        out = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            do_sample=True,
            top_k=0,
            max_new_tokens=TOKENS,
            num_return_sequences=K,
            pad_token_id=pad,
        )
        return int((out[:, longest:] != pad).sum())


@pytest.mark.parametrize(
    "variant", ["ours", "no shared prefill", "transformers generate", "one question", "one question, not shared"]
)
def test_rollout(variant: str, model: Any, tokenizer: Any, scale: Any, benchmark: Any) -> None:
    """Tokens per second, prefill included, and peak memory."""
    workload = real_workload(tokenizer, scale, PROMPTS, K)
    prompts: list[Any] = [group.prompt_ids for group in workload.groups]
    case = f"K={K} P={workload.prompt_tokens:.0f} R={TOKENS}"
    contender: Any
    if variant.startswith("one question"):
        question, text = prompts[0][: round(QUESTION * len(prompts[0]))], prompts[1]
        rest = len(prompts[0]) - len(question)
        prompts = [[*question, *text[first : first + rest]] for first in range(AT_ONCE)]
        contender = Engine(model, tokenizer, scale, prompts, 1, variant == "one question")
        case = f"K=1 P={len(prompts[0])} R={TOKENS}, {AT_ONCE} prompts that share {QUESTION:.0%}"
    elif variant == "transformers generate":
        contender = Generate(model, tokenizer, prompts)
    elif variant == "ours":
        contender = Engine(model, tokenizer, scale, prompts, K, True)
    else:
        contender = Engine(model, tokenizer, scale, [prompt for prompt in prompts for _ in range(K)], 1, False)
    tokens, seconds = [], []

    def once() -> None:
        started = time.perf_counter()
        tokens.append(contender.run())
        seconds.append(time.perf_counter() - started)

    with PeakMemory() as peak:
        benchmark.pedantic(once, rounds=2, iterations=1)
    best = max(t / s for t, s in zip(tokens, seconds, strict=True))
    values = {"tokens_per_s": (best, "1/s"), "seconds": (min(seconds), "s"), "peak_bytes": (peak.bytes, "B")}
    append("rollout", "SmolLM2-135M", variant, case, values)
