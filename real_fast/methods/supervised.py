"""Training on given feedback: sft, raft and tract differ by which terms of one loss they have, and by nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from real_fast.config import Config
from real_fast.data.dataset import Dataset, Rejected
from real_fast.errors import DataError
from real_fast.methods.objective import Loss, LossOutput, Totals, wide
from real_fast.score.scale import ScoreScale
from real_fast.types import Batch, Group, JudgeRow, Rollout
from real_fast.utils.seeds import random_stream
from real_kernels import expected_score, label_weights, score_logprobs, weighted_logprob


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
        logp = score_logprobs(hidden[batch.score_rows], weight, scale.ids_tensor(device), validate=validate)
        y_hat = expected_score(logp, values, renormalize)
        logprobs = torch.full(batch.targets.shape, float("nan"), device=device, dtype=dtype)
        total, parts = torch.zeros((), device=device, dtype=dtype), {}
        if terms.feedback:
            coefficients = torch.full(batch.targets.shape, -terms.feedback / count, device=device, dtype=dtype)
            text, logprobs = weighted_logprob(
                hidden[batch.rows], weight, batch.targets, coefficients, validate=validate
            )
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
