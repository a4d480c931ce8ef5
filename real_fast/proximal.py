"""Objectives that hold the policy near another: KL to the reference, and several optimiser steps on the same rollouts.

A token's coefficient then depends on its own log-probability, so the head recomputes instead of taking the gradient in
the forward pass (8 N D V FLOPs instead of 6), with plain autograd on top. Without either, the fused objectives of
:mod:`real_fast.objective` are used.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from real_fast.batch import Batch
from real_fast.config import ObjectiveConfig
from real_fast.objective import Loss, LossOutput, Totals, batch_advantages, outcome_logprob, outcome_reward, wide
from real_fast.scale import ScoreScale
from real_kernels import (
    HeadOptions,
    RewardTerms,
    expected_score,
    linear_logprob,
    reward_terms,
    score_logprobs,
)


def k3(logp: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimate of KL(policy, reference) at tokens drawn from the policy: ``exp(d) - 1 - d``.

    With ``d = reference - logp``: never negative, 0 where the two agree, and unbiased over tokens drawn from the policy
    (http://joschu.net/blog/kl-approx.html, as in GRPO, arXiv 2402.03300). Differentiable in `logp`.

    Args:
        logp: [N] log-probabilities by the policy.
        reference: [N] those by the reference.

    Returns:
        [N] nats.
    """
    d = reference - logp
    return torch.expm1(d) - d


class Surrogate(NamedTuple):
    """See :func:`clipped_surrogate`; each is [N], and `value` alone carries a gradient.

    Attributes:
        value: What is maximised.
        ratio: Probability now over probability then.
        clipped: bool, where the clip took the gradient.
    """

    value: torch.Tensor
    ratio: torch.Tensor
    clipped: torch.Tensor


def clipped_surrogate(logp: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, epsilon: float) -> Surrogate:
    """PPO's ``min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon) * A)``, arXiv 1707.06347, equation 7.

    Args:
        logp: [N] log-probabilities now, differentiable.
        old: [N] those that the rollouts were first seen with; constants.
        advantages: [N] constants.
        epsilon: Half the clip's width.
    """
    ratio = (logp - old).exp()
    value = torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    above, below = (ratio > 1 + epsilon) & (advantages > 0), (ratio < 1 - epsilon) & (advantages < 0)
    return Surrogate(value, ratio.detach(), above | below)


class Scored(NamedTuple):
    """What the score rows give: rewards and advantages [M], detached, and a differentiable part of the loss."""

    rewards: torch.Tensor
    advantages: torch.Tensor
    loss: torch.Tensor


def proximal_objective(
    method: Literal["real", "binary_rl"],
    config: ObjectiveConfig,
    scale: ScoreScale,
    temperature: float,
    totals: Totals,
    every_row: bool,
    reference: torch.Tensor | None = None,
    first: LossOutput | None = None,
) -> Loss:
    """The loss of one micro-batch, REAL's or the binary reward's, with the KL and the clipped ratio.

    The first iteration's policy gradient is the fused objectives': its ratio is 1, so A * ratio and A * logp have one
    gradient. Later ones keep its advantages, as PPO's bound supposes, which the sampling policy's rewards give. REAL's
    refinement term is the gradient of the reward at the weights as they are, in every iteration, and is not weighted.

    Args:
        method: Which rewards.
        config: Options of the objective.
        scale: The score scale.
        temperature: Sampling temperature of the feedback.
        totals: Counts over the update.
        every_row: Compute the log-probability of rows that have no gradient too.
        reference: [N] the reference's log-probabilities of the sampled tokens, where kl_coef is above 0.
        first: What the first iteration returned for this micro-batch; None in the first.
    """
    share = totals.divisor(config)
    explores = method == "binary_rl" or config.exploration
    score_part = "refinement" if method == "real" else "score"

    def loss(hidden: torch.Tensor, weight: torch.Tensor, batch: Batch) -> LossOutput:
        dtype, validate = wide(hidden), not hidden.is_cuda
        values = scale.values_tensor(hidden.device).to(dtype)
        ids, head = scale.ids_tensor(hidden.device), HeadOptions(validate=validate)
        scores = score_logprobs(hidden[batch.score_rows], weight, ids, head=head)
        if method == "real":
            scored = _real(config, totals.rollouts, values, scores, batch, first)
        else:
            scored = _binary(config, share, values, scores, batch, first)

        per_row = scored.advantages[batch.rollout] * explores
        every = reference is not None or (every_row and explores)
        computed = batch.valid[batch.rollout] if every else per_row != 0
        rows = computed.nonzero()[:, 0]
        head = HeadOptions(temperature=temperature, validate=validate)
        logp = linear_logprob(hidden[batch.rows[rows]], weight, batch.targets[rows], head=head)
        surrogate = None
        value = per_row[rows] * logp
        if first is not None:
            surrogate = clipped_surrogate(logp, first.logprobs[rows], per_row[rows], config.epsilon)
            value = surrogate.value
        exploration = -value.sum() / share
        parts = {"exploration" if method == "real" else "feedback": exploration, score_part: scored.loss}
        kl = None
        if reference is not None:
            kl = k3(logp, reference[rows])
            parts["kl"] = config.kl_coef * kl.sum() / share
        return LossOutput(
            sum(parts.values(), torch.zeros_like(exploration)),
            scores.detach(),
            expected_score(scores.detach(), values, config.renormalize),
            torch.full_like(per_row, float("nan")).index_copy(0, rows, logp.detach()),
            computed,
            {name: part.detach() for name, part in parts.items()},
            scored.rewards,
            scored.advantages,
            None if kl is None else kl.detach(),
            None if surrogate is None else surrogate.ratio,
            None if surrogate is None else surrogate.clipped,
        )

    return loss


def with_kl(loss: Loss, reference: torch.Tensor, temperature: float) -> Loss:
    """A loss that measures the KL to the reference too, and has the same gradient to the last bit.

    Args:
        loss: Any on rollouts.
        reference: [N] the reference's log-probabilities of the sampled tokens.
        temperature: Sampling temperature of the feedback.
    """

    def measured(hidden: torch.Tensor, weight: torch.Tensor, batch: Batch) -> LossOutput:
        out = loss(hidden, weight, batch)
        live = batch.valid[batch.rollout]
        # Rows that the loss left out, since their coefficient is 0, count here.
        missing = (live & ~out.computed).nonzero()[:, 0]
        head = HeadOptions(temperature=temperature, validate=False)
        with torch.no_grad():
            found = linear_logprob(hidden[batch.rows[missing]], weight, batch.targets[missing], head=head)
        out.kl = k3(out.logprobs.index_copy(0, missing, found), reference)[live]
        return out

    return measured


def _real(
    config: ObjectiveConfig,
    share: int,
    values: torch.Tensor,
    scores: torch.Tensor,
    batch: Batch,
    first: LossOutput | None,
) -> Scored:
    """REAL's rewards, as :func:`real_kernels.real_loss` has them, and the refinement loss."""
    labels = batch.labels.to(values.dtype)

    def terms(logp: torch.Tensor) -> RewardTerms:
        return reward_terms(
            logp,
            values,
            labels,
            reward=config.reward,
            lam=config.lam,
            renormalize=config.renormalize,
            validate=not values.is_cuda,
        )

    own = terms(scores)
    refinement = -config.beta * torch.where(batch.valid, own.refinement, 0.0).sum() / share
    if first is not None:
        return Scored(*_of(first), refinement)
    from_engine = config.reward_from == "engine" and batch.engine_scores.shape[1]
    judged = terms(batch.engine_scores.to(values.dtype)) if from_engine else own
    advantages = torch.zeros_like(labels)
    for term, weight in zip(judged.terms, judged.weights, strict=True):
        advantages = advantages + weight * batch_advantages(config, term, batch)
    return Scored(judged.reward.detach(), advantages, refinement)


def _binary(
    config: ObjectiveConfig,
    share: int,
    values: torch.Tensor,
    scores: torch.Tensor,
    batch: Batch,
    first: LossOutput | None,
) -> Scored:
    """The reward 1[drawn score = label]; the drawn score is an action like the feedback's tokens, and clipped alike."""
    chosen = outcome_logprob(scores, batch.outcome)
    if first is None:
        rewards = outcome_reward(batch.labels.to(values.dtype), values, batch.outcome)
        advantages = batch_advantages(config, rewards, batch)
        value = advantages * chosen
    else:
        rewards, advantages = _of(first)
        old = outcome_logprob(first.score_logprobs, batch.outcome)
        value = clipped_surrogate(chosen, old, advantages, config.epsilon).value
    return Scored(rewards, advantages, -torch.where(batch.valid, value, 0.0).sum() / share)


def _of(first: LossOutput) -> tuple[torch.Tensor, torch.Tensor]:
    assert first.rewards is not None and first.advantages is not None
    return first.rewards, first.advantages
