"""Importance weights of rollouts: their probability now over that under the weights that sampled them."""

from __future__ import annotations

import torch


def sequence_weights(
    logp: torch.Tensor, sampled: torch.Tensor, rollout: torch.Tensor, count: int, cap: float
) -> torch.Tensor:
    """Each rollout's ``min(cap, exp(sum of logp - sum of sampled))``, a constant.

    An expectation over rollouts of the policy is one over rollouts of the sampler with these weights, exactly where
    they are not cut. That takes the whole sequence's ratio: with a weight for each token, as in GRPO's token-level
    correction, a reward at the sequence's end is still averaged over the sampler's tokens in front of it, and a
    gradient that goes through no token at all (REAL's refinement) is not corrected. The cap bounds the variance, at
    the price of a bias (truncated importance sampling, Ionides 2008).

    Args:
        logp: [n] log-probabilities of actions now; no gradient goes through the weights.
        sampled: [n] those under the weights that sampled.
        rollout: [n] int64, which rollout each action is of.
        count: M, the number of rollouts.
        cap: Largest weight; 0 for none.

    Returns:
        [M] in the dtype of `logp`; 1 for a rollout without actions here.
    """
    # Summed in float64, so that the order in which a GPU adds does not show.
    gaps = logp.detach().double() - sampled.double()
    weights = gaps.new_zeros(count).index_add(0, rollout, gaps).exp()
    return (weights.clamp(max=cap) if cap else weights).to(logp.dtype)
