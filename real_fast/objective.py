"""What is minimised on rollouts: REAL, and the binary reward it is compared with. Losses for ``Policy.forward``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from real_fast.batch import Batch, Group
from real_fast.config import ObjectiveConfig
from real_fast.rollout.assemble import random_stream
from real_fast.scale import ScoreScale
from real_kernels import (
    HeadOptions,
    RealObjective,
    expected_score,
    group_advantages,
    real_loss,
    score_logprobs,
    weighted_logprob,
)


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

    def divisor(self, config: ObjectiveConfig) -> int:
        """What the policy gradient's sum over tokens is divided by, as ``loss_norm`` says."""
        return self.rollouts if config.loss_norm == "sequence_sum" else self.tokens


@dataclass
class LossOutput:
    """What every method's loss returns; all but `loss` is detached.

    Attributes:
        loss: Scalar to call ``backward()`` on.
        score_logprobs: [M, K] log-probabilities of the score tokens (temperature 1, full softmax).
        expected_score: [M] RAIL predictions.
        logprobs: [N] log-probabilities of the sampled (or given) tokens; NaN where `computed` is False.
        computed: [N] bool, rows that went through the head.
        parts: The loss's parts by name, scalars whose sum over micro-batches is the update's.
        rewards: [M]; None for a method without.
        advantages: [M]; None for a method without.
        kl: [n] k3 estimates for the sampled tokens of valid rollouts, in nats; None where it was not measured.
        ratio: [n] probability over that of the first iteration, of the tokens that were computed; None in the first.
        clipped: [n] bool, where the clip took the gradient.
    """

    loss: torch.Tensor
    score_logprobs: torch.Tensor
    expected_score: torch.Tensor
    logprobs: torch.Tensor
    computed: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    rewards: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    ratio: torch.Tensor | None = None
    clipped: torch.Tensor | None = None

    @property
    def off_scale_mass(self) -> torch.Tensor:
        """[M] probability outside the score tokens."""
        return 1 - self.score_logprobs.exp().sum(1)


Loss = Callable[[torch.Tensor, torch.Tensor, Batch], LossOutput]


def real_objective(
    config: ObjectiveConfig, scale: ScoreScale, temperature: float, totals: Totals, every_row: bool
) -> Loss:
    """REAL's loss of one micro-batch; see :func:`real_kernels.real_loss`.

    Args:
        config: Options of the objective.
        scale: The score scale.
        temperature: Sampling temperature of the feedback.
        totals: Counts over the update.
        every_row: Compute the log-probability of rows with coefficient 0 too (to compare engine and trainer).
    """
    from_engine = config.reward_from == "engine"
    objective = RealObjective(
        reward=config.reward,
        lam=config.lam,
        beta=config.beta,
        baseline=config.baseline,
        normalize_std=config.normalize_std,
        advantage_clip=config.advantage_clip,
        loss_norm=config.loss_norm,
        renormalize=config.renormalize,
    )

    def loss(hidden: torch.Tensor, weight: torch.Tensor, batch: Batch) -> LossOutput:
        # Refinement alone has no use for the feedback's rows.
        n = len(batch.targets) if config.exploration else 0
        judged = None
        if from_engine and batch.engine_scores.shape[1]:
            judged = batch.engine_scores.to(wide(hidden))
        out = real_loss(
            hidden[batch.rows[:n]],
            weight,
            batch.targets[:n],
            batch.rollout[:n],
            hidden[batch.score_rows],
            scale.ids_tensor(hidden.device),
            scale.values_tensor(hidden.device).to(wide(hidden)),
            batch.labels.to(wide(hidden)),
            batch.group,
            rollout_valid=batch.valid,
            engine_score_logprobs=judged,
            num_rollouts=totals.rollouts,
            num_tokens=totals.tokens,
            skip_zero_rows=not every_row,
            objective=objective,
            head=HeadOptions(temperature=temperature, validate=not hidden.is_cuda),
        )
        missing = len(batch.targets) - n
        return LossOutput(
            out.loss,
            out.score_logprobs,
            out.expected_score,
            torch.cat([out.logprobs, out.logprobs.new_full((missing,), float("nan"))]),
            torch.cat([out.computed, out.computed.new_zeros(missing)]),
            {"exploration": out.exploration_loss, "refinement": out.refinement_loss},
            out.rewards,
            out.advantages,
        )

    return loss


def draw_scores(groups: Sequence[Group], seed: int) -> None:
    """Draw each rollout's score from its distribution, for the binary reward: an outcome in 0..K, K for off the scale.

    A function of the seed, the group's place and the rollout's place; the engine's distribution is drawn from.
    """
    for group in groups:
        for place, rollout in enumerate(group.rollouts):
            if rollout.score_logprobs is None:
                continue
            left = random_stream(seed, group.index, place, 1).random()  # not the one that drew the feedback's tokens
            p = torch.tensor(rollout.score_logprobs, dtype=torch.float64).exp().tolist()
            rollout.outcome = len(p)
            for k, share in enumerate(p):
                left -= share
                if left < 0:
                    rollout.outcome = k
                    break


def outcome_logprob(logp: torch.Tensor, outcome: torch.Tensor) -> torch.Tensor:
    """[M] log-probability of each drawn score, given those of the K score tokens [M, K] and outcomes [M] in 0..K."""
    off = torch.log1p(-logp.exp().sum(1).clamp(max=1 - 1e-6))
    return torch.cat([logp, off[:, None]], 1).gather(1, outcome.clamp(min=0)[:, None])[:, 0]


def outcome_reward(labels: torch.Tensor, values: torch.Tensor, outcome: torch.Tensor) -> torch.Tensor:
    """[M] of 1 where the drawn score is the one nearest to the label (one of two, for a label between them), and 0."""
    distance = (labels[:, None].double() - values.double()).abs()
    nearest = distance <= distance.amin(1, keepdim=True) + 1e-6
    drawn = outcome[:, None] == torch.arange(len(values), device=outcome.device)
    return (nearest & drawn).any(1).to(values.dtype)


def batch_advantages(config: ObjectiveConfig, rewards: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[M] advantages of rewards [M] within the batch's groups, as the config has them."""
    return group_advantages(
        rewards,
        batch.group,
        rollout_valid=batch.valid,
        baseline=config.baseline,
        normalize_std=config.normalize_std,
        clip=config.advantage_clip,
    )


def binary_objective(
    config: ObjectiveConfig, scale: ScoreScale, temperature: float, totals: Totals, every_row: bool
) -> Loss:
    """Policy gradient of the reward 1[drawn score = label], the score drawn too: the paper's binary baseline.

    A label between two scores counts as the nearer one. Advantages as REAL's. A score off the scale is one outcome,
    whose probability is what the score tokens leave. The gradient goes through the log-probabilities alone.
    """

    def loss(hidden: torch.Tensor, weight: torch.Tensor, batch: Batch) -> LossOutput:
        device, dtype = hidden.device, wide(hidden)
        values = scale.values_tensor(device).to(dtype)
        head = HeadOptions(validate=not hidden.is_cuda)
        logp = score_logprobs(hidden[batch.score_rows], weight, scale.ids_tensor(device), head=head)
        chosen = outcome_logprob(logp, batch.outcome)
        reward = outcome_reward(batch.labels.to(dtype), values, batch.outcome)
        advantage = batch_advantages(config, reward, batch)
        share = totals.divisor(config)
        coefficient = -advantage / share
        per_row = coefficient[batch.rollout]
        computed = batch.valid[batch.rollout] if every_row else per_row != 0
        rows = computed.nonzero()[:, 0]
        text, found = weighted_logprob(
            hidden[batch.rows[rows]],
            weight,
            batch.targets[rows],
            per_row[rows],
            head=HeadOptions(temperature=temperature, validate=False),
        )
        logprobs = torch.full_like(per_row, float("nan")).index_copy(0, rows, found)
        score = torch.where(batch.valid, coefficient * chosen, 0.0).sum()
        return LossOutput(
            text + score,
            logp.detach(),
            expected_score(logp.detach(), values, config.renormalize),
            logprobs,
            computed,
            {"feedback": text.detach(), "score": score.detach()},
            reward,
            advantage,
        )

    return loss


def wide(hidden: torch.Tensor) -> torch.dtype:
    """float64 for float64 hidden states, float32 for all others."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
