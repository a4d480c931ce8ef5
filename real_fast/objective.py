"""What is minimised: REAL on rollouts, cross-entropy on given feedback. Each is a loss for ``Policy.forward``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from real_fast.batch import Batch, Group
from real_fast.config import ObjectiveConfig
from real_fast.data import JudgeRow
from real_fast.rollout.base import Rollout
from real_fast.scale import ScoreScale
from real_kernels import RealLossOutput, label_weights, real_loss, score_logprobs, weighted_logprob


@dataclass(frozen=True)
class Totals:
    """Counts over the whole update, so that a micro-batch's loss does not depend on how groups are packed."""

    rollouts: int
    tokens: int

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Totals:
        """Count valid rollouts and their sampled tokens."""
        valid = [r for g in groups for r in g.rollouts if r.has_score]
        return cls(max(len(valid), 1), max(sum(len(r.sampled_ids) for r in valid), 1))


def real_objective(
    config: ObjectiveConfig, scale: ScoreScale, temperature: float, totals: Totals, every_row: bool
) -> Callable[[torch.Tensor, torch.Tensor, Batch], RealLossOutput]:
    """REAL's loss of one micro-batch; see :func:`real_kernels.real_loss`.

    Args:
        config: Options of the objective.
        scale: The score scale.
        temperature: Sampling temperature of the feedback.
        totals: Counts over the update.
        every_row: Compute the log-probability of rows with coefficient 0 too (to compare engine and trainer).
    """

    from_engine = config.reward_from == "engine"

    def loss(hidden: torch.Tensor, weight: torch.Tensor, batch: Batch) -> RealLossOutput:
        return real_loss(
            hidden[batch.rows],
            weight,
            batch.targets,
            batch.rollout,
            hidden[batch.score_rows],
            scale.ids_tensor(hidden.device),
            scale.values_tensor(hidden.device).to(_wide(hidden)),
            batch.labels.to(_wide(hidden)),
            batch.group,
            valid=batch.valid,
            reward=config.reward,
            lam=config.lam,
            beta=config.beta,
            baseline=config.baseline,
            normalize_std=config.normalize_std,
            advantage_clip=config.advantage_clip,
            loss_norm=config.loss_norm,
            renormalize=config.renormalize,
            reward_logprobs=batch.engine_scores if from_engine and batch.engine_scores.shape[1] else None,
            temperature=temperature,
            num_rollouts=totals.rollouts,
            num_tokens=totals.tokens,
            drop_zero_rows=not every_row,
            validate=not hidden.is_cuda,
        )

    return loss


@dataclass
class CrossEntropyOutput:
    """`loss` carries the gradient; `score_loss` is the mean cross-entropy of the score tokens, detached."""

    loss: torch.Tensor
    score_loss: torch.Tensor
    score_logprobs: torch.Tensor


def cross_entropy(
    scale: ScoreScale, totals: Totals
) -> Callable[[torch.Tensor, torch.Tensor, Batch], CrossEntropyOutput]:
    """Mean cross-entropy of feedback, phrase and score tokens; a label between two scores is a target of two tokens."""

    def loss(hidden: torch.Tensor, weight: torch.Tensor, batch: Batch) -> CrossEntropyOutput:
        device = hidden.device
        validate = not hidden.is_cuda
        logp = score_logprobs(hidden[batch.score_rows], weight, scale.ids_tensor(device), validate=validate)
        q = label_weights(batch.labels, scale.values_tensor(device), validate=validate).to(_wide(hidden))
        count = totals.tokens + totals.rollouts
        coefficients = torch.full(batch.targets.shape, -1.0 / count, device=device, dtype=_wide(hidden))
        text, _ = weighted_logprob(hidden[batch.rows], weight, batch.targets, coefficients, validate=validate)
        score = -(q * logp).sum()
        return CrossEntropyOutput(text + score / count, score.detach() / totals.rollouts, logp.detach())

    return loss


def given_feedback(row: JudgeRow, index: int, place: int, tokenizer: Any, scale: ScoreScale) -> Group:
    """A row's own feedback as a group of one: every token counts, none is forced.

    Args:
        row: A row with at least one feedback.
        index: Which of its feedbacks.
        place: The group's place in the update.
        tokenizer: The model's tokenizer.
        scale: The score scale.
    """
    ids = [*tokenizer.encode(row.feedbacks[index].strip(), add_special_tokens=False), *scale.phrase_ids]
    k = len(scale.values)
    rollout = Rollout(ids, [0.0] * len(ids), ids, 0, "phrase", [0.0] * k, None)
    return Group(place, row.prompt_ids, row.feedback_labels[index], [rollout])


def _wide(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
