"""From score log-probabilities to what the rows need: rewards, advantages, coefficients, the refinement's gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch

from real_kernels.advantage import group_advantages
from real_kernels.options import RealObjective
from real_kernels.reward import RewardParts, reward_gradient, reward_parts


class RolloutCoefficients(NamedTuple):
    """What each rollout's rewards make of its rows; all [M] but the last, detached.

    Attributes:
        expected_score: RAIL predictions, in units of the scale.
        reward: The rewards that the advantages come from.
        advantages: Leave-one-out, normalised, clipped; 0 for a rollout that is left out.
        coefficient: Of each log-probability of the rollout's text in the loss.
        refinement: The rollout's part of the refinement loss.
        dlogp: [M, K], derivative of the refinement loss with respect to the score log-probabilities.
    """

    expected_score: torch.Tensor
    reward: torch.Tensor
    advantages: torch.Tensor
    coefficient: torch.Tensor
    refinement: torch.Tensor
    dlogp: torch.Tensor


def rollout_coefficients(
    logp: torch.Tensor,
    engine_score_logprobs: torch.Tensor | None,
    values: torch.Tensor,
    labels: torch.Tensor,
    group: torch.Tensor,
    rollout_valid: torch.Tensor,
    counts: torch.Tensor,
    objective: RealObjective,
) -> RolloutCoefficients:
    """The plain PyTorch version, and the oracle of the fused one.

    Args:
        logp: [M, K] score log-probabilities (temperature 1, full softmax).
        engine_score_logprobs: [M, K] those whose rewards the advantages come from; None for `logp`.
        values: [K] ascending scores.
        labels: [M] on the scale.
        group: [M] int64, equal for rollouts of one prompt.
        rollout_valid: [M] bool; the others are left out, whatever they hold.
        counts: [2] rollouts and tokens of the whole update, as floats.
        objective: What the loss is.
    """

    def parts_of(score_logprobs: torch.Tensor) -> RewardParts:
        return reward_parts(
            score_logprobs,
            values,
            labels,
            reward=objective.reward,
            lam=objective.lam,
            renormalize=objective.renormalize,
            validate=False,
        )

    own = parts_of(logp)
    rewarded = own if engine_score_logprobs is None else parts_of(engine_score_logprobs)
    advantages = torch.zeros_like(labels)
    for part, weight in zip(rewarded.terms, rewarded.weights, strict=True):
        advantages = advantages + weight * group_advantages(
            part,
            group,
            rollout_valid=rollout_valid,
            baseline=objective.baseline,
            normalize_std=objective.normalize_std,
            clip=objective.advantage_clip,
        )
    denominator = counts[0] if objective.loss_norm == "sequence_sum" else counts[1]
    zero = torch.zeros((), dtype=logp.dtype, device=logp.device)
    # A rollout that is left out may hold anything, NaN too.
    scale = torch.where(rollout_valid, -objective.beta / counts[0], zero)
    slope = reward_gradient(
        logp, values, labels, reward=objective.reward, lam=objective.lam, renormalize=objective.renormalize
    )
    return RolloutCoefficients(
        own.expected_score,
        rewarded.reward,
        advantages,
        torch.where(rollout_valid, -advantages / denominator, zero),
        torch.where(rollout_valid, own.refinement * scale, zero),
        torch.where(rollout_valid[:, None], slope * scale[:, None], zero),
    )
