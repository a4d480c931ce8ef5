"""What the trainer and the judges need from a rollout engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor

from real_fast.distributed.shard import whole
from real_fast.model.lora import is_adapted
from real_fast.types import Rollout, SamplingParams


class RolloutEngine(Protocol):
    """What the trainer needs from an engine.

    Attributes:
        name: For logs and reports.
        dtype: What the body of its model computes in.
        takes: Dtype that it keeps weights in: no more of the trainer's digits than that are sent to it.
        vocabulary: Rows of its model's embedding; no token id is above.
        held_bytes: Memory that it keeps while it is awake, weights that are not the trainer's and cache.
        beside_training: Whether it may sample, in a thread of its own, while the trainer changes its weights: its own
            weights are then those of the last sync.
    """

    name: str
    dtype: torch.dtype
    takes: torch.dtype
    vocabulary: int
    beside_training: bool

    @property
    def held_bytes(self) -> int:
        """See above."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Rollout]]:
        """Sample ``sampling.n`` rollouts for every prompt (token ids); one list per prompt, in order."""

    def sync(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take over the trainer's weights, under their Transformers names. An engine that sleeps wakes up first."""

    def sleep(self) -> bool:
        """Give memory back until the next sync, where the engine can. Returns whether it sleeps."""

    def sync_adapters(self, model: Any) -> None:
        """Take over the adapters of the trainer's model; its other weights are those that the engine started with."""

    def close(self) -> None:
        """Free what the engine holds."""


def publish(engine: RolloutEngine, model: Any) -> None:
    """Hand the trainer's weights to an engine; of a model with adapters (:mod:`real_fast.model.lora`) these alone.

    Weights that are spread over ranks are made whole one after the other; all ranks call this.

    Raises:
        ValueError: The engine has another model.
    """
    if is_adapted(model):
        engine.sync_adapters(model)
    else:
        engine.sync(
            (name, whole(parameter, engine.takes) if isinstance(parameter, DTensor) else parameter.detach())
            for name, parameter in model.named_parameters()
        )
