"""The REAL loss in one call: score rows, rewards, group advantages, row coefficients, feedback rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from real_kernels.advantage import Baseline, group_advantages
from real_kernels.checks import check_head, check_index, check_shape
from real_kernels.logprob import CHUNK_BYTES, score_logprobs, weighted_logprob
from real_kernels.reward import Reward, reward_terms

LossNorm = Literal["sequence_sum", "token_mean"]


@dataclass
class RealLossOutput:
    """Everything but `loss` is detached.

    Attributes:
        loss: Scalar to call ``backward()`` on.
        exploration_loss: The policy-gradient part of it.
        refinement_loss: The part through the reward itself.
        logprobs: [N] log-probabilities of the targets at the sampling temperature; NaN where `computed` is False.
        computed: [N] bool, rows that went through the head (a zero coefficient is dropped before it).
        score_logprobs: [M, K] log-probabilities of the score tokens (temperature 1, full softmax).
        expected_score: [M] RAIL predictions.
        rewards: [M], those that the advantages come from.
        advantages: [M], clipped, as used.
        off_scale_mass: [M] probability outside the score tokens.
    """

    loss: torch.Tensor
    exploration_loss: torch.Tensor
    refinement_loss: torch.Tensor
    logprobs: torch.Tensor
    computed: torch.Tensor
    score_logprobs: torch.Tensor
    expected_score: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    off_scale_mass: torch.Tensor


def real_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    rollout: torch.Tensor,
    score_hidden: torch.Tensor,
    score_ids: torch.Tensor,
    score_values: torch.Tensor,
    labels: torch.Tensor,
    group: torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    reward: Reward = "paper",
    lam: float = 1.0,
    beta: float = 1.0,
    baseline: Baseline = "leave_one_out",
    normalize_std: bool = True,
    advantage_clip: float = 1.0,
    loss_norm: LossNorm = "sequence_sum",
    renormalize: bool = False,
    reward_logprobs: torch.Tensor | None = None,
    temperature: float = 1.0,
    num_rollouts: int | None = None,
    num_tokens: int | None = None,
    drop_zero_rows: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
    validate: bool = True,
) -> RealLossOutput:
    """REAL's loss, minus the generalised policy gradient's objective (arXiv 2603.17145).

    ``loss = -1/R sum_i [ A_i * sum_t log pi(c_it) + beta * r_i ]`` over the R rollouts of the update, with
    ``r_i = -(y_hat_i - y_i)^2 + lam * log p_i(y_i)``, ``y_hat_i = sum_k k p_ik`` and A_i the detached leave-one-out
    advantage of r_i in its group, divided by the group's standard deviation and clipped. Score rows are
    projected first, so their rewards give the coefficients of the feedback rows of the same call: no second forward.

    The rows of one group must be in one call. With `num_rollouts` (and `num_tokens`) of the whole update given, the sum
    of the losses over calls does not depend on how groups are spread over them.

    Gradients reach `hidden`, `score_hidden` and `weight`. Under LoRA with a frozen head no dW is computed. Tied
    embeddings get both gradients through autograd. A sharded weight must be gathered by the caller.

    Args:
        hidden: [N, D] hidden states that predict sampled tokens (the position before each).
        weight: [V, D] weight of the lm_head, same dtype and device.
        targets: [N] int64, the sampled tokens. Appended (forced) tokens are not among them.
        rollout: [N] int64 in 0..M-1, the rollout that each row belongs to.
        score_hidden: [M, D] hidden states at the phrase's last token, one per rollout.
        score_ids: [K] int64, different token ids.
        score_values: [K] float32 (float64 for float64 input), ascending scores.
        labels: [M] float32 (float64), labels on the scale.
        group: [M] int64, equal for rollouts of one prompt.
        valid: [M] bool; rollouts without a score (``answer: generated``) add nothing, whatever stands in their rows.
        reward: "paper" or "reference", see :func:`real_kernels.reward_terms`.
        lam: Weight of the label's (log-)probability in the reward.
        beta: Weight of the refinement gradient; 1 is the exact gradient, 0 exploration alone.
        baseline: "leave_one_out" or "mean".
        normalize_std: Divide advantages by the group's standard deviation.
        advantage_clip: Clip advantages to plus or minus this; 0 for none.
        loss_norm: "sequence_sum": as above; "token_mean": the exploration term is divided by the number of sampled
            tokens instead of the number of rollouts.
        renormalize: Softmax over the score tokens alone for the reward.
        reward_logprobs: [M, K] score log-probabilities (temperature 1, full softmax) whose rewards the advantages come
            from, such as the rollout engine's; this call's own by default. The refinement gradient is always this
            call's.
        temperature: Sampling temperature of the feedback tokens; the score distribution is always read at 1.
        num_rollouts: R, valid rollouts of the whole update; this call's by default.
        num_tokens: Sampled tokens of valid rollouts of the whole update; this call's by default.
        drop_zero_rows: Leave rows with coefficient 0 out of the head (exact).
        chunk_bytes: Most bytes of logits alive at a time.
        validate: Check values too: ids and rollouts in range, labels on the scale. Each such check waits for a GPU;
            with False, only the selection of rows does, once.

    Raises:
        ValueError: Shapes, dtypes, devices, ids, labels or options that do not fit; the message names the argument.
    """
    check_head(hidden, weight)
    check_head(score_hidden, weight, "score_hidden")
    n, m, device = hidden.shape[0], score_hidden.shape[0], hidden.device
    check_index("targets", targets, (n,), weight.shape[0], device, validate)
    check_index("rollout", rollout, (n,), m, device, validate)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    check_shape("labels", labels, (m,), device)
    check_shape("group", group, (m,), device)
    check_shape("score_values", score_values, tuple(score_ids.shape), device)
    for name, tensor in (("labels", labels), ("score_values", score_values)):
        if tensor.dtype != wide:
            raise ValueError(f"{name} must be {wide}, not {tensor.dtype}")
    if valid is None:
        valid = torch.ones(m, dtype=torch.bool, device=device)
    check_shape("valid", valid, (m,), device)
    if loss_norm not in ("sequence_sum", "token_mean"):
        raise ValueError(f'loss_norm must be "sequence_sum" or "token_mean", not {loss_norm!r}')

    logp = score_logprobs(score_hidden, weight, score_ids, chunk_bytes=chunk_bytes, validate=validate)
    terms = reward_terms(logp, score_values, labels, reward=reward, lam=lam, renormalize=renormalize, validate=validate)
    judged = terms
    if reward_logprobs is not None:
        check_shape("reward_logprobs", reward_logprobs, tuple(logp.shape), device)
        judged = reward_terms(
            reward_logprobs.detach().to(wide),
            score_values,
            labels,
            reward=reward,
            lam=lam,
            renormalize=renormalize,
            validate=False,
        )
    options = {"valid": valid, "baseline": baseline, "normalize_std": normalize_std, "clip": advantage_clip}
    advantages = torch.zeros_like(labels)
    for part, weight_of_part in zip(judged.terms, judged.weights, strict=True):
        advantages = advantages + weight_of_part * group_advantages(part, group, **options)  # type: ignore[arg-type]

    live = valid[rollout]
    rollouts = valid.sum().clamp(min=1) if num_rollouts is None else num_rollouts
    tokens = live.sum().clamp(min=1) if num_tokens is None else num_tokens
    coefficients = torch.where(live, -advantages[rollout], torch.zeros((), dtype=wide, device=device))
    coefficients = coefficients / (rollouts if loss_norm == "sequence_sum" else tokens)
    logprobs = torch.full((n,), float("nan"), dtype=wide, device=device)
    computed = coefficients != 0 if drop_zero_rows else live
    rows = computed.nonzero()[:, 0]
    exploration, chosen = weighted_logprob(
        hidden.index_select(0, rows),
        weight,
        targets.index_select(0, rows),
        coefficients.index_select(0, rows),
        temperature=temperature,
        chunk_bytes=chunk_bytes,
        validate=False,
    )
    logprobs.index_copy_(0, rows, chosen)
    refinement = -beta * torch.where(valid, terms.refinement, torch.zeros_like(terms.refinement)).sum() / rollouts
    return RealLossOutput(
        loss=exploration + refinement,
        exploration_loss=exploration.detach(),
        refinement_loss=refinement.detach(),
        logprobs=logprobs,
        computed=computed,
        score_logprobs=logp.detach(),
        expected_score=terms.expected_score.detach(),
        rewards=judged.reward.detach(),
        advantages=advantages,
        off_scale_mass=1 - logp.detach().exp().sum(1),
    )
