"""Triton: rewards, group advantages, row coefficients and the refinement's gradient in one launch.

The plain twin is :func:`real_kernels.rollout_coefficients.rollout_coefficients`: a dozen small PyTorch operations, each
of which is a launch, on tensors of a few hundred numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from real_kernels.advantage import STD_EPS
from real_kernels.reward import LOG_ZERO

_EPS = tl.constexpr(STD_EPS)
_LOG_ZERO = tl.constexpr(LOG_ZERO)
_UNALIGNED = [
    *("logp", "engine_score_logprobs", "values", "labels", "group", "rollout_valid", "counts"),
    *("y_hat", "reward", "advantages", "coefficient", "refinement", "dlogp"),
]


@triton.jit
def score_terms(logp, values, labels, rows, row_mask, K, RENORMALIZE: tl.constexpr, KP: tl.constexpr):
    """p, q, the scale's values, y_hat, -(y_hat - y)^2, sum_k q_k l_k and sum_k q_k p_k of a block of rollouts."""
    k = tl.arange(0, KP)
    there = row_mask[:, None] & (k < K)[None, :]
    at_l = tl.load(logp + rows[:, None] * K + k[None, :], mask=there, other=float("-inf"))
    # Rows past the end would be all -inf.
    at_l = tl.where(row_mask[:, None], at_l, 0.0)
    if RENORMALIZE:
        peak = tl.max(at_l, 1)
        at_l -= (peak + tl.log(tl.sum(tl.exp(at_l - peak[:, None]), 1)))[:, None]
    p = tl.where(there, tl.exp(at_l), 0.0)
    v = tl.load(values + k, mask=k < K, other=0.0)
    # The label's weights are linear interpolation: hat functions on the grid, one-sided at its ends.
    below = tl.load(values + k - 1, mask=(k > 0) & (k < K), other=float("-inf"))
    above = tl.load(values + k + 1, mask=k + 1 < K, other=float("inf"))
    y = tl.load(labels + rows, mask=row_mask, other=0.0)
    up = (y[:, None] - below[None, :]) / (v - below)[None, :]
    down = (above[None, :] - y[:, None]) / (above - v)[None, :]
    up = tl.where((k == 0)[None, :], 1.0, up)
    down = tl.where((k == K - 1)[None, :], 1.0, down)
    q = tl.where(there, tl.minimum(tl.maximum(tl.minimum(up, down), 0.0), 1.0), 0.0)
    y_hat = tl.sum(p * v[None, :], 1)
    squared = -(y_hat - y) * (y_hat - y)
    p_label = tl.sum(q * p, 1)
    # Not by a maximum, which makes a number of NaN. The floor has no gradient, so that q is 0 there.
    log_label = tl.sum(tl.where(q > 0, q * tl.where(at_l < _LOG_ZERO, _LOG_ZERO, at_l), 0.0), 1)
    q = tl.where(at_l < _LOG_ZERO, 0.0, q)
    return p, q, v, y, y_hat, squared, log_label, p_label


@triton.jit
def two_terms(squared, log_label, p_label, lam, REFERENCE: tl.constexpr):
    """The terms that get an advantage of their own: one for the paper's reward (the second is 0), two otherwise."""
    if REFERENCE:
        return squared, p_label
    else:
        return squared + lam * log_label, p_label * 0


@triton.jit
def advantage(mean, variance, count, clip, LEAVE_ONE_OUT: tl.constexpr, NORMALIZE: tl.constexpr):
    """As :func:`real_kernels.group_advantages`; `mean` is that of one's own reward minus each of the group's."""
    a = mean
    if LEAVE_ONE_OUT:
        a = a * count / tl.maximum(count - 1, 1.0)
    if NORMALIZE:
        a = a / (tl.sqrt(variance) + _EPS)
    if clip > 0:  # not by minimum and maximum, which make a number of NaN
        a = tl.where(a > clip, clip, tl.where(a < -clip, -clip, a))
    return tl.where(count > 1, a, 0.0)


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=_UNALIGNED)
def reward_kernel(
    logp,  # [M, K] score log-probabilities
    engine_score_logprobs,  # [M, K] those that the rewards and advantages come from; may be logp
    values,  # [K]
    labels,  # [M]
    group,  # [M] int64
    rollout_valid,  # [M] uint8
    counts,  # [2]: rollouts and tokens of the update
    y_hat,  # [M] out, as are all below
    reward,  # [M]
    advantages,  # [M]
    coefficient,  # [M]: of every log-probability of the rollout's text
    refinement,  # [M]: -beta / rollouts times what the refinement gradient goes through
    dlogp,  # [M, K]: derivative of the loss with respect to logp
    M,
    K,
    lam,
    beta,
    clip,
    REFERENCE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOKEN_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    KP: tl.constexpr,
):
    """Grid: blocks of rollouts; each walks over all rollouts twice, for the mean and for the spread of its groups.

    Both are of one's own reward minus each of the group's, so that equal ones give advantages of exactly 0.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_mask = i < M
    mine = tl.load(group + i, mask=row_mask, other=0)
    ok = (tl.load(rollout_valid + i, mask=row_mask, other=0) != 0) & row_mask
    _p, _q, _v, _y, _h, squared, log_label, p_label = score_terms(
        engine_score_logprobs, values, labels, i, row_mask, K, RENORMALIZE, KP
    )
    own_a, own_b = two_terms(squared, log_label, p_label, lam, REFERENCE)
    count = tl.zeros((BLOCK,), tl.float32)
    sum_a = tl.zeros((BLOCK,), tl.float32)
    sum_b = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        there = j < M
        fine = (tl.load(rollout_valid + j, mask=there, other=0) != 0) & there
        same = (mine[:, None] == tl.load(group + j, mask=there, other=0)[None, :]) & ok[:, None] & fine[None, :]
        _p, _q, _v, _y, _h, squared, log_label, p_label = score_terms(
            engine_score_logprobs, values, labels, j, there, K, RENORMALIZE, KP
        )
        a, b = two_terms(squared, log_label, p_label, lam, REFERENCE)
        count += tl.sum(same.to(tl.float32), 1)
        sum_a += tl.sum(tl.where(same, own_a[:, None] - a[None, :], 0.0), 1)
        sum_b += tl.sum(tl.where(same, own_b[:, None] - b[None, :], 0.0), 1)
    members = tl.maximum(count, 1.0)
    mean_a = sum_a / members
    mean_b = sum_b / members
    square_a = tl.zeros((BLOCK,), tl.float32)
    square_b = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        there = j < M
        fine = (tl.load(rollout_valid + j, mask=there, other=0) != 0) & there
        same = (mine[:, None] == tl.load(group + j, mask=there, other=0)[None, :]) & ok[:, None] & fine[None, :]
        _p, _q, _v, _y, _h, squared, log_label, p_label = score_terms(
            engine_score_logprobs, values, labels, j, there, K, RENORMALIZE, KP
        )
        a, b = two_terms(squared, log_label, p_label, lam, REFERENCE)
        from_a = tl.where(same, own_a[:, None] - a[None, :] - mean_a[:, None], 0.0)
        from_b = tl.where(same, own_b[:, None] - b[None, :] - mean_b[:, None], 0.0)
        square_a += tl.sum(from_a * from_a, 1)
        square_b += tl.sum(from_b * from_b, 1)
    advantage_i = advantage(mean_a, square_a / members, count, clip, LEAVE_ONE_OUT, NORMALIZE)
    reward_i = own_a
    if REFERENCE:
        advantage_i += lam * advantage(mean_b, square_b / members, count, clip, LEAVE_ONE_OUT, NORMALIZE)
        reward_i = own_a + lam * own_b
    # A left-out rollout may hold anything, NaN too.
    advantage_i = tl.where(ok, advantage_i, 0.0)
    tl.store(reward + i, reward_i, mask=row_mask)
    tl.store(advantages + i, advantage_i, mask=row_mask)
    rollouts = tl.load(counts)
    tokens = tl.load(counts + 1)
    share = -advantage_i / (tokens if TOKEN_MEAN else rollouts)
    tl.store(coefficient + i, tl.where(ok, share, 0.0), mask=row_mask)

    p, q, v, y, hat, squared, log_label, p_label = score_terms(logp, values, labels, i, row_mask, K, RENORMALIZE, KP)
    gain = squared
    slope = -2 * (hat - y)[:, None] * v[None, :] * p
    if not REFERENCE:
        gain += lam * log_label
        slope += lam * q
    if RENORMALIZE:
        slope -= p * tl.sum(slope, 1)[:, None]
    scale = tl.where(ok, -beta / rollouts, 0.0)
    tl.store(y_hat + i, hat, mask=row_mask)
    tl.store(refinement + i, tl.where(ok, gain * scale, 0.0), mask=row_mask)
    k = tl.arange(0, KP)
    at = dlogp + i[:, None] * K + k[None, :]
    tl.store(at, tl.where(ok[:, None], slope * scale[:, None], 0.0), mask=row_mask[:, None] & (k < K)[None, :])
