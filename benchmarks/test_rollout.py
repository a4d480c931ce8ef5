"""Rollouts: sampled tokens per second, K per prompt, by us and by Transformers' own generate."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from benchmarks.machine import PeakMemory
from benchmarks.record import append
from benchmarks.workload import real_workload
from real_fast.attention.support import enable
from real_fast.rollout.transformers_engine import TransformersEngine
from real_fast.types import SamplingParams

K, PROMPTS, TOKENS = 8, 2, 48


class Engine:
    """Our engine; `shared`: K samples share their prompt's prefill."""

    def __init__(self, model: Any, tokenizer: Any, scale: Any, prompts: list[Any], shared: bool) -> None:
        enable(model, "sdpa")
        self.engine = TransformersEngine(model, tokenizer, scale, max_num_seqs=K * PROMPTS, dtype=torch.bfloat16)
        self.prompts = prompts if shared else [prompt for prompt in prompts for _ in range(K)]
        self.n = K if shared else 1

    def run(self) -> int:
        """Sample, and count the tokens."""
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


@pytest.mark.parametrize("variant", ["ours", "no shared prefill", "transformers generate"])
def test_rollout(variant: str, model: Any, tokenizer: Any, scale: Any, benchmark: Any) -> None:
    """Tokens per second, prefill included, and peak memory."""
    workload = real_workload(tokenizer, scale, PROMPTS, K)
    prompts = [group.prompt_ids for group in workload.groups]
    contender: Any = (
        Generate(model, tokenizer, prompts)
        if variant == "transformers generate"
        else Engine(model, tokenizer, scale, prompts, variant == "ours")
    )
    tokens, seconds = [], []

    def once() -> None:
        started = time.perf_counter()
        tokens.append(contender.run())
        seconds.append(time.perf_counter() - started)

    with PeakMemory() as peak:
        benchmark.pedantic(once, rounds=2, iterations=1)
    best = max(t / s for t, s in zip(tokens, seconds, strict=True))
    values = {"tokens_per_s": (best, "1/s"), "seconds": (min(seconds), "s"), "peak_bytes": (peak.bytes, "B")}
    append("rollout", "SmolLM2-135M", variant, f"K={K} P={workload.prompt_tokens:.0f} R={TOKENS}", values)
