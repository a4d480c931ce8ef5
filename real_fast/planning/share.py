"""The share of a GPU's memory that vLLM gets beside the trainer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from real_fast.config.schema import Config, RolloutConfig

# Where nothing is planned: a CPU, on which vLLM's cache has a size of its own.
USUAL_SHARE = 0.4


def engine_share(rollout: RolloutConfig) -> float:
    """``rollout.gpu_memory_utilization`` as a number."""
    share = rollout.gpu_memory_utilization
    return USUAL_SHARE if share == "auto" else share


def with_engine_share(config: Config, model_config: Any, room: int | None) -> Config:
    """The settings with the number that ``rollout.gpu_memory_utilization: auto`` stands for on this device.

    Args:
        config: A run's settings.
        model_config: The Transformers config of its model.
        room: Bytes of the GPU that trainer and vLLM share; None on a CPU.
    """
    return replace(config, rollout=replace(config.rollout, gpu_memory_utilization=engine_share(config.rollout)))
