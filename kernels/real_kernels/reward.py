"""Rewards of REAL from the score tokens' log-probabilities: small tensors, plain formulas, differentiable.

Sources: REAL, arXiv 2603.17145; the RAIL prediction (expected score) is the Bayes estimate for squared error.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from real_kernels.options import Reward

# What log p of an impossible label counts as: below any that float32 logits give, and its square is finite.
LOG_ZERO = -1e15


class RewardParts(NamedTuple):
    """What the objective needs of the rewards, each [M] and differentiable in the log-probabilities.

    Attributes:
        reward: The reward that is reported.
        terms: Each is given a group advantage of its own, and `weights` sums them.
        weights: One float per term.
        refinement: Its gradient is the second term of the generalised policy gradient.
        expected_score: The RAIL prediction.
    """

    reward: torch.Tensor
    terms: tuple[torch.Tensor, ...]
    weights: tuple[float, ...]
    refinement: torch.Tensor
    expected_score: torch.Tensor


def label_weights(labels: torch.Tensor, values: torch.Tensor, *, validate: bool = True) -> torch.Tensor:
    """Weights q of a label on the scale: one-hot, or linear interpolation between the two neighbours.

    Args:
        labels: [M] floats within the scale.
        values: [K] ascending scores.
        validate: Check values too, such as labels on the scale. Each such check waits for a GPU: False once the
            caller has made sure of them.

    Returns:
        [M, K] weights that sum to 1 with ``(q * values).sum(1) == labels``.

    Raises:
        ValueError: Values that do not ascend, or a label off the scale.
    """
    if values.dim() != 1 or values.numel() < 2 or (validate and not bool((values[1:] > values[:-1]).all())):
        raise ValueError(f"score_values must be at least two ascending scores, not {values.tolist()}")
    if validate:
        bad = ~((labels >= values[0]) & (labels <= values[-1]))
        if bool(bad.any()):
            raise ValueError(f"labels {labels[bad].tolist()[:5]} are off the scale {values.tolist()}")
    low = (torch.searchsorted(values, labels, right=True) - 1).clamp(0, values.numel() - 2)
    share = (labels - values[low]) / (values[low + 1] - values[low])
    q = torch.zeros(labels.numel(), values.numel(), dtype=labels.dtype, device=labels.device)
    q.scatter_(1, low[:, None], (1 - share)[:, None])
    return q.scatter_(1, low[:, None] + 1, share[:, None])


def expected_score(logp: torch.Tensor, values: torch.Tensor, renormalize: bool = False) -> torch.Tensor:
    """The RAIL prediction: sum_k k p_k.

    Args:
        logp: [M, K] log-probabilities of the score tokens.
        values: [K] scores.
        renormalize: Take p over the score tokens alone. Off by default, as in the paper's code and in TRACT.

    Returns:
        [M] expected scores, in units of the scale.
    """
    return (_normalized(logp, renormalize).exp() * values).sum(1)


def reward_parts(
    logp: torch.Tensor,
    values: torch.Tensor,
    labels: torch.Tensor,
    *,
    reward: Reward = "paper",
    lam: float = 1.0,
    renormalize: bool = False,
    validate: bool = True,
) -> RewardParts:
    """Rewards of M rollouts.

    "paper" (arXiv 2603.17145): ``r = -(y_hat - y)^2 + lam * log p_y``, with ``log p_y`` interpolated between two
    scores' log-probabilities for a label between them; one advantage, and the refinement gradient is that of r.
    Where p_y is 0, as for a score token that a bias of -inf masks out, ``log p_y`` counts as -1e15, a constant without
    a gradient: the loss shows it, the advantages of the group take the values that they tend to as p_y goes to 0, and
    with ``lam = 0`` nothing is left of it.
    "authors" (their code): ``-(y_hat - y)^2`` and ``lam * p_y`` each with an advantage of its own, and the
    refinement gradient is that of the squared error alone.

    Args:
        logp: [M, K] log-probabilities of the score tokens.
        values: [K] ascending scores, same dtype as `logp`.
        labels: [M] labels on the scale, same dtype.
        reward: "paper" or "authors".
        lam: Weight of the label's probability.
        renormalize: See :func:`expected_score`.
        validate: See :func:`label_weights`.

    Raises:
        ValueError: Shapes that do not fit, labels off the scale, an unknown reward.
    """
    if logp.shape != (labels.shape[0], values.shape[0]):
        raise ValueError(f"logp must have shape {(labels.shape[0], values.shape[0])}, not {tuple(logp.shape)}")
    q = label_weights(labels, values, validate=validate)
    logp = _normalized(logp, renormalize)
    y_hat = expected_score(logp, values)
    regression = -((y_hat - labels) ** 2)
    if reward == "paper":
        # 0 log 0 is 0: a score that the bias masks out counts for labels on it alone.
        r = regression + lam * torch.where(q > 0, q * logp.clamp(min=LOG_ZERO), 0.0).sum(1)
        return RewardParts(r, (r,), (1.0,), r, y_hat)
    if reward == "authors":
        p_label = (q * logp.exp()).sum(1)
        return RewardParts(regression + lam * p_label, (regression, p_label), (1.0, lam), regression, y_hat)
    raise ValueError(f'reward must be "paper" or "authors", not {reward!r}')


def reward_gradient(
    logp: torch.Tensor,
    values: torch.Tensor,
    labels: torch.Tensor,
    *,
    reward: Reward = "paper",
    lam: float = 1.0,
    renormalize: bool = False,
) -> torch.Tensor:
    """Derivative of each rollout's `refinement` (see :class:`RewardParts`) with respect to its log-probabilities.

    ``d(-(y_hat - y)^2 + lam sum_k q_k l_k) / dl_k = -2 (y_hat - y) k p_k + lam q_k``; no lambda for "authors", nor
    where ``l_k`` is -inf.

    Returns:
        [M, K].
    """
    l_k = _normalized(logp, renormalize)
    p = l_k.exp()
    error = (p * values).sum(1, keepdim=True) - labels[:, None]
    slope = -2 * error * values * p
    if reward == "paper":
        slope = slope + lam * label_weights(labels, values, validate=False) * (l_k >= LOG_ZERO)
    # Through l - logsumexp(l).
    return slope - p * slope.sum(1, keepdim=True) if renormalize else slope


# The former names, kept for those who import them.
RewardTerms = RewardParts
reward_terms = reward_parts


def _normalized(logp: torch.Tensor, renormalize: bool) -> torch.Tensor:
    return logp - torch.logsumexp(logp, 1, keepdim=True) if renormalize else logp
