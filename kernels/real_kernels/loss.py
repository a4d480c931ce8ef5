"""The REAL loss in one call: score rows, rewards, group advantages, row coefficients, feedback rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from real_kernels.advantage import Baseline
from real_kernels.checks import check_head, check_index, check_score_ids, check_shape
from real_kernels.head import Impl, Mode
from real_kernels.matmul import accumulator
from real_kernels.options import check_options, gradient_in_forward, wanted
from real_kernels.real_op import real_head
from real_kernels.reward import Reward
from real_kernels.rollout_terms import LossNorm


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
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    impl: Impl = "auto",
    mode: Mode = "auto",
    chunk_bytes: int | None = None,
    validate: bool = True,
) -> RealLossOutput:
    """REAL's loss, minus the generalised policy gradient's objective (arXiv 2603.17145).

    ``loss = -1/R sum_i [ A_i * sum_t log pi(c_it) + beta * r_i ]`` over the R rollouts of the update, with
    ``r_i = -(y_hat_i - y_i)^2 + lam * log p_i(y_i)``, ``y_hat_i = sum_k k p_ik`` and A_i the detached leave-one-out
    advantage of r_i in its group, divided by the group's standard deviation and clipped. Score rows are
    projected first, so their rewards give the coefficients of the feedback rows of the same call: no second forward.

    The rows of one group must be in one call. With `num_rollouts` (and `num_tokens`) of the whole update given, the sum
    of the losses over calls does not depend on how groups are spread over them.

    Gradients reach `hidden`, `score_hidden`, `weight` and `bias`. Under LoRA with a frozen head no dW is computed (an
    adapter on the lm_head itself must be merged into `weight` by the caller). A tied head gets its gradient here and
    the embedding's elsewhere, and autograd adds them up. A weight that FSDP2 shards must be whole where it is used:
    call the loss inside the ``forward`` of the wrapped module, or pass ``weight.full_tensor()``.

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
        reward_logprobs: [M, K] float32 (float64) score log-probabilities (temperature 1, full softmax) whose rewards
            the advantages come from, such as the rollout engine's; this call's own by default. The refinement gradient
            is always this call's.
        temperature: Sampling temperature of the feedback tokens; the score distribution is always read at 1.
        num_rollouts: R, valid rollouts of the whole update; this call's by default.
        num_tokens: Sampled tokens of valid rollouts of the whole update; this call's by default.
        drop_zero_rows: Leave rows with coefficient 0 out of the head (exact). How many are left is asked of a GPU
            once; False, with `valid` not given, is the way without any wait.
        bias: [V] of the lm_head, same dtype as `weight`.
        softcap: Logits become ``softcap * tanh(logits / softcap)``, before the temperature.
        impl: "triton", "torch", or "auto": Triton for 16-bit tensors on CUDA, PyTorch otherwise.
        mode: Where the head's gradient is computed: "forward" (6 N D V FLOPs) or "recompute" (8 N D V, less memory);
            "auto" takes "forward" unless `chunk_bytes` cuts the rows into chunks too small to be worth it.
        chunk_bytes: Most bytes of logits (or of their gradients) alive at a time; 256 MiB, and 1 GiB for Triton.
        validate: Check values too: ids and rollouts in range, labels on the scale. They wait for a GPU once.

    Raises:
        ValueError: Shapes, dtypes, devices, ids, labels or options that do not fit; the message names the argument.
    """
    chosen, room = check_options(hidden, weight, bias, temperature, softcap, impl, chunk_bytes)
    check_head(score_hidden, weight, "score_hidden")
    n, m, device = hidden.shape[0], score_hidden.shape[0], hidden.device
    check_index("targets", targets, (n,), device)
    check_index("rollout", rollout, (n,), device)
    check_score_ids(score_ids, device)
    check_shape("score_values", score_values, tuple(score_ids.shape), device)
    check_shape("labels", labels, (m,), device)
    check_index("group", group, (m,), device)
    wide = accumulator(hidden.dtype)
    for name, tensor in (("labels", labels), ("score_values", score_values)):
        if tensor.dtype != wide:
            raise ValueError(f"{name} must be {wide}, not {tensor.dtype}")
    if score_values.numel() < 2:
        raise ValueError(f"score_values must be at least two ascending scores, not {score_values.tolist()}")
    if valid is not None:
        check_shape("valid", valid, (m,), device)
        if valid.dtype != torch.bool:
            raise ValueError(f"valid must be bool, not {valid.dtype}")
    if reward_logprobs is not None:
        check_shape("reward_logprobs", reward_logprobs, (m, score_ids.shape[0]), device)
        if reward_logprobs.dtype != wide:
            raise ValueError(f"reward_logprobs must be {wide}, not {reward_logprobs.dtype}")
    for name, value, known in (
        ("loss_norm", loss_norm, ("sequence_sum", "token_mean")),
        ("reward", reward, ("paper", "reference")),
        ("baseline", baseline, ("leave_one_out", "mean")),
    ):
        if value not in known:
            raise ValueError(f'{name} must be "{known[0]}" or "{known[1]}", not {value!r}')
    for name, count in (("num_rollouts", num_rollouts), ("num_tokens", num_tokens)):
        if count is not None and not count > 0:
            raise ValueError(f"{name} must be above 0, not {count}")
    if not advantage_clip >= 0:
        raise ValueError(f"advantage_clip must be 0 or more, not {advantage_clip}")
    need_hidden, need_scores, need_weight, need_bias = wanted(hidden, score_hidden, weight, bias)
    loss, exploration, logprobs, computed, logp, rollouts, *_ = real_head(
        hidden,
        score_hidden,
        weight,
        bias,
        targets,
        rollout,
        score_ids,
        score_values,
        labels,
        group,
        valid,
        None if reward_logprobs is None else reward_logprobs.detach(),
        reward,
        lam,
        beta,
        baseline,
        normalize_std,
        advantage_clip,
        loss_norm,
        renormalize,
        temperature,
        softcap,
        num_rollouts,
        num_tokens,
        drop_zero_rows,
        gradient_in_forward(mode, chosen, weight, softcap, room, n),
        chosen,
        room,
        validate,
        need_hidden or need_scores,
        need_weight,
        need_bias,
    )
    expected, rewards, advantages = rollouts.unbind(0)
    return RealLossOutput(
        loss=loss,
        exploration_loss=exploration,
        refinement_loss=(loss - exploration).detach(),
        logprobs=logprobs,
        computed=computed,
        score_logprobs=logp,
        expected_score=expected,
        rewards=rewards,
        advantages=advantages,
        off_scale_mass=1 - logp.exp().sum(1),
    )
