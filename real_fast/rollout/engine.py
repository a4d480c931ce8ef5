"""What the trainer and the judges need from a rollout engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from real_fast.types import Rollout, SamplingParams


class RolloutEngine(Protocol):
    """What the trainer needs from an engine.

    Attributes:
        name: For logs and reports.
        dtype: What the body of its model computes in.
        held_bytes: Memory that it keeps while it is awake, weights that are not the trainer's and cache.
    """

    name: str
    dtype: torch.dtype
    held_bytes: int

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Rollout]]:
        """Sample ``sampling.n`` rollouts for every prompt (token ids); one list per prompt, in order."""

    def sync(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take over the trainer's weights, under their Transformers names. An engine that sleeps wakes up first."""

    def sleep(self) -> bool:
        """Give memory back until the next sync, where the engine can. Returns whether it sleeps."""

    def close(self) -> None:
        """Free what the engine holds."""
