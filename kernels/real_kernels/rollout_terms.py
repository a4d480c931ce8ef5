"""From score log-probabilities to what the rows need: rewards, advantages, coefficients, the refinement's gradient."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from real_kernels.advantage import Baseline, group_advantages
from real_kernels.reward import Reward, reward_gradient, reward_terms

LossNorm = Literal["sequence_sum", "token_mean"]


class RolloutOptions(NamedTuple):
    """Options of the objective, as :func:`real_kernels.real_loss` takes them."""

    reward: Reward
    lam: float
    beta: float
    baseline: Baseline
    normalize_std: bool
    clip: float
    loss_norm: LossNorm
    renormalize: bool


class RolloutTerms(NamedTuple):
    """All [M] but the last, detached.

    Attributes:
        expected_score: RAIL predictions.
        reward: The rewards that the advantages come from.
        advantages: Leave-one-out, normalised, clipped; 0 for a rollout that is left out.
        coefficient: Of each log-probability of the rollout's text in the loss.
        refinement: The rollout's part of the refinement loss.
        u: [M, K], derivative of the refinement loss with respect to the score log-probabilities.
    """

    expected_score: torch.Tensor
    reward: torch.Tensor
    advantages: torch.Tensor
    coefficient: torch.Tensor
    refinement: torch.Tensor
    u: torch.Tensor


def rollout_terms(
    logp: torch.Tensor,
    judged: torch.Tensor,
    values: torch.Tensor,
    labels: torch.Tensor,
    group: torch.Tensor,
    valid: torch.Tensor,
    counts: torch.Tensor,
    options: RolloutOptions,
) -> RolloutTerms:
    """The plain PyTorch version, and the oracle of the fused one.

    Args:
        logp: [M, K] score log-probabilities (temperature 1, full softmax).
        judged: [M, K] those whose rewards the advantages come from.
        values: [K] ascending scores.
        labels: [M] on the scale.
        group: [M] int64.
        valid: [M] bool.
        counts: [2] rollouts and tokens of the whole update, as floats.
        options: Of the objective.
    """
    own = reward_terms(
        logp, values, labels, reward=options.reward, lam=options.lam, renormalize=options.renormalize, validate=False
    )
    terms = own
    if judged is not logp:
        terms = reward_terms(
            judged,
            values,
            labels,
            reward=options.reward,
            lam=options.lam,
            renormalize=options.renormalize,
            validate=False,
        )
    advantages = torch.zeros_like(labels)
    for part, weight in zip(terms.terms, terms.weights, strict=True):
        advantages = advantages + weight * group_advantages(
            part,
            group,
            valid=valid,
            baseline=options.baseline,
            normalize_std=options.normalize_std,
            clip=options.clip,
        )
    denominator = counts[0] if options.loss_norm == "sequence_sum" else counts[1]
    zero = torch.zeros((), dtype=logp.dtype, device=logp.device)
    # A rollout that is left out may hold anything, NaN too.
    scale = torch.where(valid, -options.beta / counts[0], zero)
    slope = reward_gradient(
        logp, values, labels, reward=options.reward, lam=options.lam, renormalize=options.renormalize
    )
    return RolloutTerms(
        own.expected_score,
        terms.reward,
        advantages,
        torch.where(valid, -advantages / denominator, zero),
        torch.where(valid, own.refinement * scale, zero),
        torch.where(valid[:, None], slope * scale[:, None], zero),
    )
