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
    """

    name: str
    dtype: torch.dtype

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Rollout]]:
        """Sample ``sampling.n`` rollouts for every prompt (token ids); one list per prompt, in order."""

    def sync(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take over the trainer's weights, under their Transformers names."""

    def close(self) -> None:
        """Free what the engine holds."""
