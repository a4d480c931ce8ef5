"""Advantages within a group of rollouts of one prompt."""

from __future__ import annotations

import torch

from real_kernels.options import BASELINES, Baseline

# As TRL's: keeps rounding noise of equal rewards from being blown up to unit advantages.
STD_EPS = 1e-4


def group_advantages(
    rewards: torch.Tensor,
    group: torch.Tensor,
    *,
    rollout_valid: torch.Tensor | None = None,
    baseline: Baseline = "leave_one_out",
    normalize_std: bool = True,
    clip: float = 1.0,
) -> torch.Tensor:
    """Leave-one-out advantages: ``A_i = r_i - mean_{j != i} r_j`` over the rollouts of the same prompt.

    Divided by the group's standard deviation (ddof 0, plus 1e-4) and clipped, as in REAL (arXiv 2603.17145). The order
    of the rollouts plays no part: a rollout's advantage depends on its own group alone.

    Args:
        rewards: [M] floats.
        group: [M] int64, equal for rollouts of one prompt.
        rollout_valid: [M] bool, None for all; rollouts that are left out get advantage 0 and count in no baseline.
        baseline: "leave_one_out", or "mean" of the whole group (as GRPO).
        normalize_std: Divide by the standard deviation.
        clip: Clip to plus or minus this; 0 for no clipping.

    Returns:
        [M] advantages in the rewards' dtype, detached. A rollout without another valid one in its group gets 0, and so
        does, exactly, one whose group has equal rewards. NaN among a group's rewards makes NaN of that group alone.

    Raises:
        ValueError: Shapes that do not fit, a negative clip, an unknown baseline.
    """
    shapes = [tuple(t.shape) for t in (rewards, group, rollout_valid) if t is not None]
    if rewards.dim() != 1 or len(set(shapes)) > 1:
        raise ValueError(f"rewards, group and rollout_valid must all be [M], not {', '.join(map(str, shapes))}")
    if baseline not in BASELINES:
        raise ValueError(f'baseline must be "leave_one_out" or "mean", not {baseline!r}')
    if not clip >= 0:
        raise ValueError(f"clip must be 0 or more, not {clip}")
    r = rewards.detach()
    same = group[:, None] == group[None, :]
    if rollout_valid is not None:
        r = torch.where(rollout_valid, r, torch.zeros_like(r))
        same = same & rollout_valid[:, None] & rollout_valid[None, :]
    count = same.sum(1).to(r.dtype)
    # One's own reward minus each other's: equal ones differ by 0, while their mean may be off by a rounding. And no
    # product with 0, so that NaN stays in its group.
    apart = torch.where(same, r[:, None] - r[None, :], 0.0)
    mean = apart.sum(1) / count.clamp(min=1)
    advantage = mean * count / (count - 1).clamp(min=1) if baseline == "leave_one_out" else mean
    if normalize_std:
        # Centred first: E[r^2] - E[r]^2 would cancel where a group's spread is small beside its mean.
        variance = (torch.where(same, apart - mean[:, None], 0.0) ** 2).sum(1) / count.clamp(min=1)
        advantage = advantage / (variance.sqrt() + STD_EPS)
    if clip:
        advantage = advantage.clamp(-clip, clip)
    return torch.where(count > 1, advantage, torch.zeros_like(advantage))
