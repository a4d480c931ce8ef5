"""Training on given feedback: sft, raft and tract differ by which terms of one loss they have, and by nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from real_fast.batch import Batch, Group
from real_fast.config import Config
from real_fast.data import DataError, Dataset, JudgeRow, Rejected
from real_fast.objective import Loss, LossOutput, Totals, wide
from real_fast.packing import BatchError
from real_fast.rollout.assemble import random_stream
from real_fast.rollout.base import Rollout
from real_fast.scale import ScoreScale
from real_kernels import HeadOptions, expected_score, label_weights, score_logprobs, weighted_logprob


@dataclass(frozen=True)
class Terms:
    """Weights of the loss's terms.

    Attributes:
        feedback: Cross-entropy of the feedback's and the phrase's tokens.
        score: Cross-entropy of the score token, in the same mean; a label between two scores is a target of two tokens.
        squared_error: (y_hat - y)^2, mean over answers, in squared score units (RAFT and TRACT, arXiv 2503.04381).
    """

    feedback: float = 0.0
    score: float = 0.0
    squared_error: float = 0.0


SFT = Terms(feedback=1.0, score=1.0)
RAFT = Terms(squared_error=1.0)


def given_feedback(row: JudgeRow, indices: Sequence[int], place: int, tokenizer: Any, scale: ScoreScale) -> Group:
    """A row with some of its own feedback texts as one group, which shares the prompt; every token counts.

    Args:
        row: A row with feedback.
        indices: Which of its feedbacks; none of them for the score right behind the phrase, with the row's label.
        place: The group's place in the update.
        tokenizer: The model's tokenizer.
        scale: The score scale.
    """
    k = len(scale.values)

    def answer(text: str | None) -> Rollout:
        if text is None:
            return Rollout([], [], list(scale.phrase_ids), len(scale.phrase_ids), "phrase", [0.0] * k, None)
        ids = [*tokenizer.encode(text.strip(), add_special_tokens=False), *scale.phrase_ids]
        return Rollout(ids, [0.0] * len(ids), ids, 0, "phrase", [0.0] * k, None)

    if not indices:
        return Group(place, row.prompt_ids, row.label, [answer(None)])
    answers = [answer(row.feedbacks[i]) for i in indices]
    return Group(place, row.prompt_ids, row.label, answers, [row.feedback_labels[i] for i in indices])


def pick_feedback(row: JudgeRow, most: int, seed: int, position: int) -> list[int]:
    """At most `most` of a row's feedbacks, drawn without repetition; a function of the seed and the row's position."""
    order = list(range(len(row.feedbacks)))
    random_stream(seed, position).shuffle(order)
    return sorted(order[:most])


def with_feedback(data: Dataset, config: Config) -> None:
    """Keep the training rows that the method can use; the others go to the rejected ones, with the reason.

    Raises:
        DataError: Fewer rows with feedback than one update needs.
    """
    if config.supervised.feedback == "none":
        return
    reason = f"no feedback: method {config.method} is trained on it"
    without = [row for row in data.train if not row.feedbacks]
    data.rejected += [Rejected(config.data.train, 0, row.id, reason, vars(row)) for row in without]
    data.train = [row for row in data.train if row.feedbacks]
    if len(data.train) < config.supervised.prompts_per_step:
        raise DataError(
            f"data.train: {len(data.train)} rows have feedback and {len(without)} have none, and "
            f"supervised.prompts_per_step needs {config.supervised.prompts_per_step}: method {config.method} is "
            "trained on feedback (real needs none, nor does raft with supervised.feedback none)"
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


def supervised_objective(terms: Terms, scale: ScoreScale, totals: Totals, renormalize: bool = False) -> Loss:
    """The loss of one micro-batch of given feedback.

    Cross-entropy is a mean over all tokens of the update that it counts; the squared error a mean over its answers.

    Args:
        terms: Which terms.
        scale: The score scale.
        totals: Counts over the update.
        renormalize: y_hat from the softmax over the score tokens alone.
    """
    count = totals.tokens * bool(terms.feedback) + totals.rollouts * bool(terms.score)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, batch: Batch) -> LossOutput:
        device, dtype, validate = hidden.device, wide(hidden), not hidden.is_cuda
        values, labels = scale.values_tensor(device).to(dtype), batch.labels.to(dtype)
        head = HeadOptions(validate=validate)
        logp = score_logprobs(hidden[batch.score_rows], weight, scale.ids_tensor(device), head=head)
        y_hat = expected_score(logp, values, renormalize)
        logprobs = torch.full(batch.targets.shape, float("nan"), device=device, dtype=dtype)
        total, parts = torch.zeros((), device=device, dtype=dtype), {}
        if terms.feedback:
            coefficients = torch.full(batch.targets.shape, -terms.feedback / count, device=device, dtype=dtype)
            text, logprobs = weighted_logprob(hidden[batch.rows], weight, batch.targets, coefficients, head=head)
            total, parts["feedback"] = total + text, text.detach()
        if terms.score:
            q = label_weights(labels, values, validate=validate)
            score = -terms.score * (q * logp).sum() / count
            total, parts["score"] = total + score, score.detach()
        if terms.squared_error:
            squared = terms.squared_error * ((y_hat - labels) ** 2).sum() / totals.rollouts
            total, parts["squared_error"] = total + squared, squared.detach()
        computed = torch.full(batch.targets.shape, bool(terms.feedback), device=device)
        return LossOutput(total, logp.detach(), y_hat.detach(), logprobs, computed, parts)

    return loss
