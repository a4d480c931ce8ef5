"""An engine that gives every prompt the same rollouts, and a row to grade."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from real_fast.types import Rollout, SamplingParams

ROW = {"instruction": "Name a fruit.", "response": "An apple.", "rubric": "Is it a fruit?", "reference_answer": "Plum."}


class FakeEngine:
    """Gives every prompt the same rollouts, and remembers the calls; fails on prompts of a certain length."""

    name, vocabulary = "fake", 100
    dtype = torch.float32

    def __init__(self, rollouts: list[Rollout], fails_at: int = -1, seconds: float = 0.0) -> None:
        self.rollouts, self.fails_at, self.seconds = rollouts, fails_at, seconds
        self.calls: list[tuple[list[list[int]], SamplingParams]] = []
        self.inside = self.most_inside = 0
        self.closed = False

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Rollout]]:
        self.calls.append(([list(p) for p in prompts], sampling))
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        time.sleep(self.seconds)
        self.inside -= 1
        if any(len(p) == self.fails_at for p in prompts):
            raise MemoryError("the cache is full")
        return [self.rollouts for _ in prompts]

    def sync(self, named_tensors: Any) -> None: ...

    def close(self) -> None:
        self.closed = True


def rollout(p: Sequence[float] | None, written: float | None = None, text: str = "Good. Grade: ") -> Rollout:
    logprobs = None if p is None else [math.log(x) for x in p]
    return Rollout([7], [-1.0], [7], 0, "phrase", logprobs, written, text)
