"""The REAL loss in one call: score rows, rewards, group advantages, row coefficients, feedback rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from real_kernels.checks import check_dtype, check_head, check_index, check_score_ids, check_shape
from real_kernels.main_grad import main_grad_of
from real_kernels.matmul import accum_dtype
from real_kernels.options import DEFAULT_HEAD, DEFAULT_OBJECTIVE, HeadOptions, RealObjective
from real_kernels.real_op import RealResults, real_head, real_head_adding
from real_kernels.resolve import gradient_in_forward, required_grads, resolve_head


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
    rollout_valid: torch.Tensor | None = None,
    engine_score_logprobs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    num_rollouts: int | None = None,
    num_tokens: int | None = None,
    skip_zero_rows: bool = True,
    objective: RealObjective = DEFAULT_OBJECTIVE,
    head: HeadOptions = DEFAULT_HEAD,
) -> RealLossOutput:
    """REAL's loss, minus the generalised policy gradient's objective (arXiv 2603.17145).

    ``loss = -1/R sum_i [ A_i * sum_t log pi(c_it) + beta * r_i ]`` over the R rollouts of the update, with
    ``r_i = -(y_hat_i - y_i)^2 + lam * log p_i(y_i)``, ``y_hat_i = sum_k k p_ik`` and A_i the detached leave-one-out
    advantage of r_i in its group, divided by the group's standard deviation and clipped. Score rows are
    projected first, so their rewards give the coefficients of the feedback rows of the same call: no second forward.

    Without rollouts (N = M = 0), or with none that is valid, the loss is 0 and so is every gradient; without rows
    (N = 0), and for a rollout that is alone in its group, the refinement is all there is. Where a label's token is
    impossible (log p = -inf), see :func:`real_kernels.reward_parts`.

    The rows of one group must be in one call. With `num_rollouts` (and `num_tokens`) of the whole update given, the sum
    of the losses over calls does not depend on how groups are spread over them.

    Gradients reach `hidden`, `score_hidden`, `weight` and `bias`. Under LoRA with a frozen head no dW is computed (an
    adapter on the lm_head itself must be merged into `weight` by the caller). A tied head gets its gradient here and
    the embedding's elsewhere, and autograd adds them up. A weight that FSDP2 shards must be whole where it is used:
    call the loss inside the ``forward`` of the wrapped module, or pass ``weight.full_tensor()``. A weight with a
    ``main_grad`` has its gradient added there (:mod:`real_kernels.main_grad`), by "forward" before ``backward()``,
    which must then be called on the loss itself, once.

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
        rollout_valid: [M] bool, None for all; rollouts without a score (``answer: generated``) add nothing, whatever
            stands in their rows.
        engine_score_logprobs: [M, K] float32 (float64) score log-probabilities (temperature 1, full softmax) whose
            rewards the advantages come from, such as the rollout engine's; None for this call's own. The refinement
            gradient is always this call's.
        bias: [V] of the lm_head, same dtype and device as `weight`; None for none.
        num_rollouts: R, valid rollouts of the whole update; None for this call's.
        num_tokens: Sampled tokens of valid rollouts of the whole update; None for this call's.
        skip_zero_rows: Leave rows with coefficient 0 out of the head (exact). How many are left is asked of a GPU
            once; False, with `rollout_valid` not given, is the way without any wait.
        objective: The reward, the advantages and the weights.
        head: How the head computes. Its temperature is the sampled tokens'; the score distribution is read at 1.

    Returns:
        The loss, a scalar in float32 (float64 for float64 input), and what it was made of.

    Raises:
        ValueError: Shapes, dtypes, devices, ids, labels or options that do not fit; the message names the argument.
    """
    impl, chunk_bytes = resolve_head(hidden, weight, bias, head)
    check_head(score_hidden, weight, "score_hidden")
    check_index("targets", targets, (hidden.shape[0],), hidden.device)
    check_index("rollout", rollout, (hidden.shape[0],), hidden.device)
    _check_scale(score_ids, score_values, hidden)
    if hidden.shape[0] and not score_hidden.shape[0]:
        raise ValueError(
            f"hidden has {hidden.shape[0]} rows and score_hidden none: a row belongs to a rollout, and each rollout "
            "has a row in score_hidden"
        )
    _check_rollouts(score_hidden, score_ids, labels, group, rollout_valid, engine_score_logprobs)
    for name, count in (("num_rollouts", num_rollouts), ("num_tokens", num_tokens)):
        if count is not None and not count > 0:
            raise ValueError(f"{name} must be above 0, not {count}")
    need_hidden, need_scores, need_weight, need_bias = required_grads(hidden, score_hidden, weight, bias)
    inputs = (
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
        rollout_valid,
        None if engine_score_logprobs is None else engine_score_logprobs.detach(),
        objective.text,
        head.text,
        gradient_in_forward(head, impl, chunk_bytes, weight, hidden.shape[0]),
        impl,
        chunk_bytes,
        num_rollouts,
        num_tokens,
        skip_zero_rows,
        need_hidden or need_scores,
        need_weight,
        need_bias,
    )
    main_grad = main_grad_of(weight)
    results = real_head(*inputs) if main_grad is None else real_head_adding(*inputs, main_grad)
    return _output(RealResults(*results))


def _check_scale(score_ids: torch.Tensor, score_values: torch.Tensor, hidden: torch.Tensor) -> None:
    check_score_ids(score_ids, hidden.device)
    check_shape("score_values", score_values, tuple(score_ids.shape), hidden.device)
    check_dtype("score_values", score_values, accum_dtype(hidden.dtype))
    if score_values.numel() < 2:
        raise ValueError(f"score_values must be at least two ascending scores, not {score_values.tolist()}")


def _check_rollouts(
    score_hidden: torch.Tensor,
    score_ids: torch.Tensor,
    labels: torch.Tensor,
    group: torch.Tensor,
    rollout_valid: torch.Tensor | None,
    engine_score_logprobs: torch.Tensor | None,
) -> None:
    m, device, dtype = score_hidden.shape[0], score_hidden.device, accum_dtype(score_hidden.dtype)
    check_shape("labels", labels, (m,), device)
    check_dtype("labels", labels, dtype)
    check_index("group", group, (m,), device)
    if rollout_valid is not None:
        check_shape("rollout_valid", rollout_valid, (m,), device)
        check_dtype("rollout_valid", rollout_valid, torch.bool)
    if engine_score_logprobs is not None:
        check_shape("engine_score_logprobs", engine_score_logprobs, (m, score_ids.shape[0]), device)
        check_dtype("engine_score_logprobs", engine_score_logprobs, dtype)


def _output(out: RealResults) -> RealLossOutput:
    expected_score, rewards, advantages = out.rollouts.unbind(0)
    return RealLossOutput(
        loss=out.loss,
        exploration_loss=out.exploration_loss,
        refinement_loss=(out.loss - out.exploration_loss).detach(),
        logprobs=out.logprobs,
        computed=out.computed,
        score_logprobs=out.score_logprobs,
        expected_score=expected_score,
        rewards=rewards,
        advantages=advantages,
        off_scale_mass=1 - out.score_logprobs.exp().sum(1),
    )
