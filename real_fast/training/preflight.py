"""What is refused before the work starts: rows whose rollouts or answers may not fit into a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from real_fast.batching.micro_batches import REMEDY
from real_fast.config import Config
from real_fast.errors import BatchError
from real_fast.score.scale import ScoreScale
from real_fast.types import JudgeRow


def longest_sequence(rows: Sequence[JudgeRow], scale: ScoreScale, config: Config) -> int:
    """Tokens of the longest prompt with the longest possible rollout behind it."""
    return max(len(row.prompt_ids) for row in rows) + config.rollout.max_tokens + len(scale.phrase_ids)


def require_room(rows: Sequence[JudgeRow], scale: ScoreScale, config: Config) -> None:
    """Refuse, before the work starts, settings under which a group may not fit into a micro-batch.

    Raises:
        BatchError: The longest prompt with its K longest possible rollouts exceeds ``train.micro_batch_tokens``.
    """
    whole = longest_sequence(rows, scale, config)
    response = config.rollout.max_tokens + len(scale.phrase_ids)
    prompt = whole - response
    k, budget = config.rollout.group_size, config.train.micro_batch_tokens
    need = prompt + k * response if config.train.shared_prompt else k * (prompt + response)
    if need > budget:
        raise BatchError(
            f"train.micro_batch_tokens is {budget}, and a group of {k} rollouts of the longest prompt ({prompt} "
            f"tokens, up to {response} behind it) needs {need}: {REMEDY}"
        )


def require_given_room(
    rows: Sequence[JudgeRow], config: Config, tokenizer: Any, scale: ScoreScale, warmup: bool = False
) -> int:
    """Refuse, before the work starts, settings under which a row's answers may not fit into a micro-batch.

    Args:
        rows: Training rows.
        config: The run's settings.
        tokenizer: The model's tokenizer.
        scale: The score scale.
        warmup: Whether it is for the warm-up, which takes one feedback at a time, any of those that there are.

    Returns:
        Tokens of the longest prompt and answer together.

    Raises:
        BatchError: The message names the row.
    """
    most, budget = 1 if warmup else config.supervised.feedbacks_per_prompt, config.train.micro_batch_tokens
    advice = "shorten the feedback, or set warmup.steps to 0" if warmup else "lower supervised.feedbacks_per_prompt"
    given = warmup or config.supervised.feedback != "none"
    longest = 0
    for row in rows:
        if warmup and not row.feedbacks:
            continue
        lengths = sorted(_lengths(row.feedbacks if given else [], tokenizer, scale))[-most:]
        prompt = len(row.prompt_ids)
        longest = max(longest, prompt + lengths[-1])
        need = prompt + sum(lengths) if config.train.shared_prompt else len(lengths) * (prompt + lengths[-1])
        if need > budget:
            raise BatchError(
                f"train.micro_batch_tokens is {budget}, and row {row.id!r} needs {need} ({prompt} of the prompt, "
                f"{len(lengths)} answers of up to {lengths[-1]}): raise it, or {advice}"
            )
    return longest


def _lengths(feedbacks: Sequence[str], tokenizer: Any, scale: ScoreScale) -> list[int]:
    """Tokens of each answer, the phrase included; of the phrase alone where there is no feedback."""
    if not feedbacks:
        return [len(scale.phrase_ids)]
    texts = [feedback.strip() for feedback in feedbacks]
    return [len(ids) + len(scale.phrase_ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]
