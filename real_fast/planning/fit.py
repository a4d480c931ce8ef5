"""The plan of a run that is about to start, for the GPU that it has: refused now, and not out of memory later."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass, replace
from typing import Any

from real_fast.config import Config
from real_fast.config.commands import PlanConfig
from real_fast.errors import ConfigError, ModelError
from real_fast.planning.changes import changed_flags, smallest_change
from real_fast.planning.memory import ModelSizes
from real_fast.planning.need import GIB, RESERVE, need
from real_fast.planning.report import why_not
from real_fast.planning.shape import counted, known_models

logger = logging.getLogger(__name__)

# vLLM's share of a GPU where nothing is planned.
USUAL_SHARE = 0.4


@dataclass(frozen=True)
class Sequences:
    """The longest that a run's rows make.

    Attributes:
        prompt: Tokens of a prompt.
        response: Tokens behind it.
        per_prompt: Responses of a prompt in one update.
        prompts: Prompts of an update.
        sampled: Whether responses are sampled.
    """

    prompt: int
    response: int
    per_prompt: int
    prompts: int
    sampled: bool = True


def check_fits(
    config: Config, model_config: Any, rows: Sequences, free: int, total: int, gpus: int = 1, gpus_per_node: int = 8
) -> float | None:
    """Refuse a run that cannot fit a GPU, and find the share of it that is left for vLLM.

    What is refused is what needs more than there is without the plan's reserve; less than the reserve is said in a
    warning.

    Args:
        config: The run's settings.
        model_config: The Transformers config of its model.
        rows: Its longest sequences.
        free: Bytes of the GPU that are free.
        total: All its bytes, of which vLLM's share is one.
        gpus: GPUs of the run, such as this one.
        gpus_per_node: Of a machine.

    Returns:
        What ``rollout.gpu_memory_utilization: auto`` is; None for Transformers, and where the model cannot be counted.

    Raises:
        ConfigError: GPUs that do not divide, or it does not fit: the message names the smallest change with which it
            does.
    """
    sizes = _sizes(config.initial_weights, model_config)
    if sizes is None:
        return None
    plan = replace(_plan_config(config, rows, free / GIB), gpus=gpus, gpus_per_node=gpus_per_node)
    kl = rows.sampled and config.objective.kl_coef > 0
    found = need(plan, sizes, kl)
    if found.fits:
        return found.share * free / total or None
    change = smallest_change(plan, sizes, kl)
    remedy = (
        f"The smallest change that fits: {changed_flags(plan, change)}"
        if change
        else ("No change of settings helps: real-fast plan names the device that would do")
    )
    if found.total - RESERVE <= found.room and found.sequences >= found.wanted:
        logger.warning(
            "this run may not fit the GPU: %s, the %.0f GiB that libraries take included. %s",
            why_not(found),
            RESERVE / GIB,
            remedy,
        )
        return found.share * free / total or None
    raise ConfigError(f"this run does not fit the GPU, which has {free / GIB:.1f} GiB free: {why_not(found)}. {remedy}")


def with_share(config: Config, share: float | None) -> Config:
    """The settings with the number that ``rollout.gpu_memory_utilization: auto`` stands for.

    Args:
        config: A run's settings.
        share: What :func:`check_fits` found; None where nothing is planned, such as a CPU.
    """
    if config.rollout.gpu_memory_utilization != "auto":
        return config
    rollout = replace(config.rollout, gpu_memory_utilization=USUAL_SHARE if share is None else share)
    return replace(config, rollout=rollout)


def _sizes(name: str, model_config: Any) -> ModelSizes | None:
    if found := known_models().get(name):
        return ModelSizes.read(found["sizes"])
    try:
        return counted(name, model_config, "").sizes
    except (ModelError, RuntimeError, TypeError, KeyError) as error:  # a model's own code, on fake tensors
        logger.info("whether the run fits the GPU is not known beforehand: %s", error)
        return None


def _plan_config(config: Config, rows: Sequences, gpu_memory: float) -> PlanConfig:
    plan = PlanConfig(**vars(config), gpu_memory=gpu_memory, prompt_tokens=rows.prompt, response_tokens=rows.response)
    rollout = replace(config.rollout, group_size=rows.per_prompt, prompts_per_step=rows.prompts)
    if rollout.engine == "auto" and importlib.util.find_spec("vllm") is None:
        rollout = replace(rollout, engine="transformers")
    return replace(plan, rollout=rollout)
