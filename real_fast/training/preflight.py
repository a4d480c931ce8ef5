"""What is refused before the work starts: a model that cannot be trained, rows that may not fit into a micro-batch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from real_fast.batching.micro_batches import REMEDY
from real_fast.config import Config, RolloutConfig, TrainConfig
from real_fast.distributed.world import ALONE, World
from real_fast.errors import BatchError, ConfigError, ModelError
from real_fast.methods.base import Method
from real_fast.model.experts import is_mixture
from real_fast.model.judge_settings import trained_settings
from real_fast.planning.fit import Sequences, check_fits
from real_fast.prompt.guard import EncodeFeedback
from real_fast.score.scale import ScoreScale
from real_fast.types import JudgeRow

logger = logging.getLogger(__name__)

# Share of the weights that an update has to be able to move.
MOVING = 0.5


def check_trainable(model: PreTrainedModel) -> None:
    """Refuse a model whose weights cannot be trained, and say what of a mixture of experts is not trained.

    Raises:
        ModelError: The model is quantised.
    """
    if quantization := getattr(model.config, "quantization_config", None):
        method = getattr(quantization, "quant_method", None) or dict(quantization).get("quant_method")
        raise ModelError(
            f"model {model.config.name_or_path} is quantised ({getattr(method, 'value', method)}), and such weights "
            "cannot be trained: take the model that it was made from"
        )
    config = model.config.get_text_config()
    if is_mixture(model.config):
        logger.warning(
            "the model is a mixture of experts, and the router's load-balancing loss (router_aux_loss_coef in its "
            "config.json: %s) is added to no method's loss: see docs/methods.md",
            getattr(config, "router_aux_loss_coef", "not given"),
        )


def warn_if_asked_otherwise(config: Config, template: str) -> None:
    """Say where the weights come from a judge that was trained with another scale or prompt than this run's.

    Args:
        config: The run's.
        template: The text of its template.
    """
    known = trained_settings(config.initial_weights)
    ours = {"scale": asdict(config.scale), "prompt": asdict(config.prompt)}
    theirs = {section: ours[section] | known.get(section, {}) for section in ours}
    saved = Path(theirs["prompt"]["template"])
    if saved.is_file() and saved.read_text(encoding="utf-8") == template:
        theirs["prompt"]["template"] = config.prompt.template
    other = [
        f"{section}.{key} was {value!r} and is {ours[section][key]!r}"
        for section, settings in theirs.items()
        for key, value in settings.items()
        if key != "max_tokens" and value != ours[section][key]
    ]
    if other:
        logger.warning("%s was trained as a judge in another way: %s", config.initial_weights, "; ".join(other))


def check_ranks(config: Config, rows: tuple[str, int], ranks: int) -> None:
    """Refuse settings that several ranks cannot use, or that ask for more ranks than there are.

    Args:
        config: The run's.
        rows: The setting of the rows of an update, and their number.
        ranks: How many there are.

    Raises:
        ConfigError: The message names the setting and what to do.
    """
    together = config.rollout.tensor_parallel if config.rollout.engine != "vllm-server" else 1
    for key, number in (("train.replicas", config.train.replicas), ("rollout.tensor_parallel", together)):
        if number > 1 and (ranks == 1 or ranks % number):
            raise ConfigError(
                f"{key} is {number}, and there {'is 1 rank' if ranks == 1 else f'are {ranks} ranks'}: start a multiple "
                f"of {number} with torchrun --nproc-per-node, or set {key} to 1"
            )
    if ranks == 1:
        return
    key, number = rows
    if number < ranks:
        raise ConfigError(
            f"{key} is {number}, and torchrun started {ranks} ranks: {ranks - number} of them would never have a row "
            f"to train on; start at most {number}, or raise {key}"
        )
    for key, given, usual in (
        ("train.quantization", config.train.quantization, ("none",)),
        ("train.weights", config.train.weights, ("fp32",)),
        ("train.head_gradient", config.train.head_gradient, ("auto", "autograd")),
        ("train.compile", config.train.compile, (False,)),
        ("train.liger", config.train.liger, (False,)),
        ("optim.offload", config.optim.offload, ("none",)),
    ):
        if given not in usual:
            shown = str(given).lower() if isinstance(given, bool) else given
            raise ConfigError(
                f"{key} is {shown}, which works on one GPU and not across {ranks} ranks: set it to "
                f"{str(usual[0]).lower()}, or start one process"
            )


def check_rates(model: nn.Module, rates: Mapping[str, float]) -> None:
    """Refuse to train 16-bit weights, without float32 masters, at rates whose updates they round away.

    AdamW moves a weight by about the learning rate. A bf16 weight has 8 binary digits, so one in [2^e, 2^(e+1)) lies
    2^(e-7) from the next, and what is not above half of that changes nothing, at any number of steps.

    Args:
        model: The model, its weights as they are trained.
        rates: Peak learning rates by the names of their settings.

    Raises:
        ConfigError: At some rate most of the weights could not move.
    """
    halves = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    for name, rate in rates.items():
        moving = sum(int((rate > _half_a_step(p)).sum()) for p in halves)
        share = moving / max(1, sum(p.numel() for p in halves))
        if halves and share < MOVING:
            raise ConfigError(
                f"train.weights is bf16 and {name} is {rate:g}: bf16 numbers are so far apart that an update of that "
                f"size would move {100 * share:.1f} % of this model's weights and be rounded away in the others; leave "
                "train.weights at fp32 (where memory is short, optim.name adamw8bit and optim.offload save it exactly "
                "or nearly so), or train an adapter"
            )


def _half_a_step(weights: torch.Tensor) -> torch.Tensor:
    """Half the distance from each weight to the next one above it in its dtype."""
    mantissa, exponent = torch.frexp(weights.detach().abs().float())  # a mantissa in [1/2, 1), or 0
    return torch.ldexp((mantissa > 0).float() * (torch.finfo(weights.dtype).eps / 4), exponent)


def check_rows_fit(
    rows: Sequence[JudgeRow], method: Method, config: Config, encode_feedback: EncodeFeedback, scale: ScoreScale
) -> int:
    """Check a run's rows, for the method and for the warm-up, and return the tokens of the longest sequence.

    Raises:
        BatchError: A group may not fit into ``train.micro_batch_tokens``.
    """
    train, supervised = config.train, config.supervised
    given = supervised.feedback == "given"
    if method.uses_rollouts:
        check_rollouts_fit(rows, scale, config.rollout, train)
        longest = longest_with_rollout(rows, scale, config.rollout)
    else:
        advice = "lower supervised.feedbacks_per_prompt"
        longest = check_supervised_fits(
            rows, given, supervised.feedbacks_per_prompt, train, encode_feedback, scale, advice
        )
    # Methods on given feedback have been checked with as much of it or more.
    if config.warmup.steps and (method.uses_rollouts or not given):
        with_feedback = [row for row in rows if row.feedbacks]
        advice = "shorten the feedback, or set warmup.steps to 0"
        longest = max(longest, check_supervised_fits(with_feedback, True, 1, train, encode_feedback, scale, advice))
    return longest


def check_memory(
    rows: Sequence[JudgeRow],
    method: Method,
    config: Config,
    longest: int,
    model_config: Any,
    gpu: tuple[int, int],
    world: World = ALONE,
) -> float | None:
    """Refuse a run that a GPU cannot hold.

    Args:
        rows: Its training rows.
        method: Its method.
        config: Its settings.
        longest: Tokens of the longest sequence, from :func:`check_rows_fit`.
        model_config: The Transformers config of its model.
        gpu: Bytes of the GPU that are free, and all.
        world: The ranks, each on a GPU such as this one.

    Returns:
        The share of the GPU that is left for vLLM; None where the model cannot be counted.

    Raises:
        ConfigError: The message names the smallest change with which it fits.
    """
    prompt, rollout, supervised = max(len(row.prompt_ids) for row in rows), config.rollout, config.supervised
    if method.uses_rollouts:
        sequences = Sequences(prompt, longest - prompt, rollout.group_size, rollout.prompts_per_step)
    else:
        each, prompts = supervised.feedbacks_per_prompt, supervised.prompts_per_step
        sequences = Sequences(prompt, max(longest - prompt, 1), each, prompts, sampled=False)
    return check_fits(config, model_config, sequences, *gpu, world.size, world.here)


def longest_with_rollout(rows: Sequence[JudgeRow], scale: ScoreScale, rollout: RolloutConfig) -> int:
    """Tokens of the longest prompt with the longest possible rollout behind it."""
    return max(len(row.prompt_ids) for row in rows) + rollout.max_tokens + scale.most_appended


def check_rollouts_fit(rows: Sequence[JudgeRow], scale: ScoreScale, rollout: RolloutConfig, train: TrainConfig) -> None:
    """Refuse settings under which a group of rollouts may not fit into a micro-batch.

    Raises:
        BatchError: The longest prompt with its K longest possible rollouts exceeds ``train.micro_batch_tokens``.
    """
    response = rollout.max_tokens + scale.most_appended
    prompt = longest_with_rollout(rows, scale, rollout) - response
    k, budget = rollout.group_size, train.micro_batch_tokens
    need = prompt + k * response if train.shared_prompt else k * (prompt + response)
    if need > budget:
        raise BatchError(
            f"train.micro_batch_tokens is {budget}, and a group of {k} rollouts of the longest prompt ({prompt} "
            f"tokens, up to {response} behind it) needs {need}: {REMEDY}"
        )


def check_supervised_fits(
    rows: Sequence[JudgeRow],
    given: bool,
    most: int,
    train: TrainConfig,
    encode_feedback: EncodeFeedback,
    scale: ScoreScale,
    advice: str,
) -> int:
    """Refuse settings under which a row's own answers may not fit into a micro-batch.

    Args:
        rows: Training rows.
        given: Whether answers hold the row's feedback, or the phrase alone.
        most: Answers of one row in one update.
        train: micro_batch_tokens and shared_prompt.
        encode_feedback: Gives the token ids of feedback texts.
        scale: The score scale.
        advice: What else than more micro_batch_tokens would help.

    Returns:
        Tokens of the longest prompt and answer together.

    Raises:
        BatchError: The message names the row.
    """
    longest = 0
    for row in rows:
        lengths = sorted(_answer_lengths(row.feedbacks if given else [], encode_feedback, scale))[-most:]
        prompt = len(row.prompt_ids)
        longest = max(longest, prompt + lengths[-1])
        need = prompt + sum(lengths) if train.shared_prompt else len(lengths) * (prompt + lengths[-1])
        if need > train.micro_batch_tokens:
            raise BatchError(
                f"train.micro_batch_tokens is {train.micro_batch_tokens}, and row {row.id!r} needs {need} ({prompt} of "
                f"the prompt, {len(lengths)} answers of up to {lengths[-1]}): raise it, or {advice}"
            )
    return longest


def _answer_lengths(feedbacks: Sequence[str], encode_feedback: EncodeFeedback, scale: ScoreScale) -> list[int]:
    """Tokens of each answer, phrase and score included; of these alone where there is no feedback."""
    behind = len(scale.phrase_ids) + 1
    if not feedbacks:
        return [len(encode_feedback([""])[0]) + behind]
    return [len(ids) + behind for ids in encode_feedback(feedbacks)]
