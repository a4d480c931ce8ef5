"""Training on feedback that comes with the data: sft, raft and tract differ by the weights of one loss."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from real_fast.config import Config
from real_fast.data.dataset import Dataset, Rejected
from real_fast.data.sources import describe
from real_fast.errors import DataError
from real_fast.methods.base import Loss, LossOutput, Method, UpdateCounts, compute_dtype
from real_fast.methods.policy_gradient import check_feedback_given
from real_fast.prompt.guard import EncodeFeedback
from real_fast.rollout.engine import RolloutEngine
from real_fast.score.scale import ScoreScale
from real_fast.types import Batch, Group, JudgeRow, Rollout
from real_fast.utils.seeds import random_stream
from real_kernels import HeadOptions, expected_score, label_weights, score_logprobs, weighted_logprob

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss's terms.

    Attributes:
        feedback: Cross-entropy of the tokens of the feedback, of the phrase and of the answer's end behind the score.
        score: Cross-entropy of the score token, in the same mean; a label between two scores is a target of two tokens.
        end: Cross-entropy of the answer's end alone, mean over answers, where the feedback's tokens are no targets.
        squared_error: (y_hat - y)^2, mean over answers, in squared score units (RAFT and TRACT, arXiv 2503.04381).
    """

    feedback: float = 0.0
    score: float = 0.0
    end: float = 0.0
    squared_error: float = 0.0


class Supervised(Method):
    """A method on given feedback. Arguments as of :class:`Method`."""

    uses_rollouts = False

    @property
    def weights(self) -> LossWeights:
        """What the loss is made of."""
        raise NotImplementedError

    @classmethod
    def prompts_per_step(cls, config: Config) -> tuple[str, int]:
        """Rows per update."""
        return "supervised.prompts_per_step", config.supervised.prompts_per_step

    @classmethod
    def check(cls, config: Config) -> None:
        """Feedback is what these methods are trained on."""
        check_feedback_given(cls, config)

    def use_rows(self, data: Dataset) -> None:
        """Keep the training rows that have feedback."""
        if self.config.supervised.feedback == "given":
            needed, settings = self.config.supervised.prompts_per_step, self.config.data
            drop_rows_without_feedback(data, describe(settings.train), self.name, needed, settings.max_rejected)

    def groups(
        self, rows: Sequence[JudgeRow], rows_seen: int, step: int, engine: RolloutEngine, compare: bool = False
    ) -> list[Group]:
        """The rows with their own feedback."""
        supervised, groups = self.config.supervised, []
        for n, row in enumerate(rows):
            most = supervised.feedbacks_per_prompt if supervised.feedback == "given" else 0
            picked = pick_feedback(row, most, self.config.seed, rows_seen + n)
            groups.append(supervised_group(row, picked, n, self.encode_feedback, self.scale))
        return groups

    def loss(self, counts: UpdateCounts, old: LossOutput | None = None, compare: bool = False) -> Loss:
        """Cross-entropy and squared error by :attr:`weights`."""
        return supervised_loss(self.weights, self.scale, counts, self.config.objective.renormalize)


def supervised_group(
    row: JudgeRow, indices: Sequence[int], place: int, encode_feedback: EncodeFeedback, scale: ScoreScale
) -> Group:
    """A row with some of its own feedback texts as one group, which shares the prompt; every token counts.

    Args:
        row: A row with feedback.
        indices: Which of its feedbacks; none of them for the score right behind the phrase, with the row's label.
        place: The group's place in the update.
        encode_feedback: Gives the token ids of feedback texts: :meth:`real_fast.prompt.guard.Guard.encode_feedback`.
        scale: The score scale; the token that ends an answer is a target behind the score nearest to the label.
    """
    k = len(scale.values)

    def ending(label: float) -> tuple[int, int] | None:
        nearest = min(range(k), key=lambda i: abs(scale.values[i] - label))
        return None if scale.end_id is None else (scale.score_ids[nearest], scale.end_id)

    if not indices:
        phrase = [*encode_feedback([""])[0], *scale.phrase_ids]
        alone = Rollout([], [], phrase, len(phrase), "phrase", [0.0] * k, None, ending=ending(row.label))
        return Group(place, row.prompt_ids, row.label, [alone], row_id=row.id)
    encoded = [[*ids, *scale.phrase_ids] for ids in encode_feedback([row.feedbacks[i] for i in indices])]
    labels = [row.feedback_labels[i] for i in indices]
    answers = [
        Rollout(ids, [0.0] * len(ids), ids, 0, "phrase", [0.0] * k, None, ending=ending(label))
        for ids, label in zip(encoded, labels, strict=True)
    ]
    return Group(place, row.prompt_ids, row.label, answers, labels, row.id)


def pick_feedback(row: JudgeRow, most: int, seed: int, position: int) -> list[int]:
    """At most `most` of a row's feedbacks, drawn without repetition; a function of the seed and the row's position."""
    order = list(range(len(row.feedbacks)))
    random_stream(seed, position).shuffle(order)
    return sorted(order[:most])


def drop_rows_without_feedback(data: Dataset, source: str, method: str, needed: int, max_rejected: float = 1) -> None:
    """Move training rows without feedback to the rejected ones.

    Args:
        data: The run's rows.
        source: Where its training rows come from, for the messages.
        method: The method's name, for the messages.
        needed: Rows of one update.
        max_rejected: Largest share of the rows that may be without feedback; 1 for any.

    Raises:
        DataError: Fewer rows with feedback than `needed`, or more without it than `max_rejected` allows.
    """
    reason = f"no feedback: method {method} is trained on it"
    without = [row for row in data.train if not row.feedbacks]
    data.rejected += [Rejected(source, 0, row.id, reason, vars(row)) for row in without]
    data.train = [row for row in data.train if row.feedbacks]
    if len(data.train) < needed:
        raise DataError(
            f"data.train: {len(data.train)} rows have feedback and {len(without)} have none, and "
            f"supervised.prompts_per_step needs {needed}: method {method} is "
            "trained on feedback (real needs none, nor does raft with supervised.feedback none)"
        )
    found = f"{source}: {len(without)} of {len(without) + len(data.train)} rows have no feedback"
    if len(without) > max_rejected * (len(without) + len(data.train)):
        raise DataError(
            f"data.train: {found}, and method {method} is trained on it: give it with the rows, or set "
            "data.max_rejected to 1 to go on with those that have it"
        )
    if without:
        logger.warning("%s, which method %s is trained on: they are left out", found, method)


def supervised_loss(weights: LossWeights, scale: ScoreScale, counts: UpdateCounts, renormalize: bool = False) -> Loss:
    """The loss of one micro-batch of given feedback.

    Cross-entropy is a mean over all tokens of the update that it counts; the squared error a mean over its answers.

    Args:
        weights: Of the loss's terms.
        scale: The score scale.
        counts: Counts over the update.
        renormalize: y_hat from the softmax over the score tokens alone.
    """
    count = counts.tokens * bool(weights.feedback) + counts.rollouts * bool(weights.score)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, batch: Batch) -> LossOutput:
        device, dtype = hidden.device, compute_dtype(hidden)
        # The terms are added up as they are, and backward() is called on the sum. On a CPU both are looked at for free.
        head = HeadOptions(validate=not hidden.is_cuda, unit_gradient=hidden.is_cuda)
        values, labels, valid = scale.values_tensor(device).to(dtype), batch.labels.to(dtype), batch.rollout_valid
        logp = score_logprobs(hidden[batch.score_rows], weight, scale.ids_tensor(device), head=head)
        y_hat = expected_score(logp, values, renormalize)
        logprobs = torch.full(batch.targets.shape, float("nan"), device=device, dtype=dtype)
        total, parts = torch.zeros((), device=device, dtype=dtype), {}
        if weights.feedback:
            coefficients = torch.full(batch.targets.shape, -weights.feedback / count, device=device, dtype=dtype)
            text, logprobs = weighted_logprob(hidden[batch.rows], weight, batch.targets, coefficients, head=head)
            total, parts["feedback"] = total + text, text.detach()
        elif weights.end and len(batch.endings):
            rows, targets = batch.rows[batch.endings], batch.targets[batch.endings]
            coefficients = torch.full(targets.shape, -weights.end / counts.rollouts, device=device, dtype=dtype)
            end, found = weighted_logprob(hidden[rows], weight, targets, coefficients, head=head)
            logprobs = logprobs.index_copy(0, batch.endings, found)
            total, parts["end"] = total + end, end.detach()
        if weights.score:
            q = label_weights(labels, values, validate=head.validate)
            score = -weights.score * torch.where(valid[:, None], q * logp, 0.0).sum() / count
            total, parts["score"] = total + score, score.detach()
        if weights.squared_error:
            squared = weights.squared_error * torch.where(valid, (y_hat - labels) ** 2, 0.0).sum() / counts.rollouts
            total, parts["squared_error"] = total + squared, squared.detach()
        computed = torch.full(batch.targets.shape, bool(weights.feedback), device=device)
        if weights.end:
            computed.index_fill_(0, batch.endings, True)
        return LossOutput(total, logp.detach(), y_hat.detach(), logprobs, computed, parts)

    return loss
