"""Log-probabilities of a few tokens per row from hidden states and the lm_head's weight, in bounded memory.

A row of hidden states h has m selected tokens s_1..s_m with l_k = log softmax(h W^T / T)[s_k]. Whatever the loss L is,
it sees the row only through them, and with dlogp_k = dL/dl_k and S = sum_k dlogp_k

    dL/dz_v = -S p_v + sum_k dlogp_k 1[v = s_k]

The selected columns are written as -dlogp_k expm1(l_k) - p_k sum_{j != k} dlogp_j, which does not cancel where p_k is
near 1. Logits are float32 for every 16-bit input (16-bit logits of magnitude 16 to 32 are off by up to 6 % in p).

All functions here take `bias`, [V] of the lm_head in the weight's dtype, and `head`, the
:class:`real_kernels.HeadOptions`: temperature, soft-cap, implementation, memory, checks.

Gradients: a frozen weight or frozen hidden states cost nothing, so under LoRA with a frozen head no dW is computed
(an adapter on the lm_head itself must be merged into `weight` by the caller, and gets its gradient through that). A
tied head gets its gradient here and the embedding's elsewhere, both added up by autograd. A sharded weight (FSDP2's
DTensor) must be whole where it is used: call the loss inside the ``forward`` of the module that FSDP2 wraps, or pass
``weight.full_tensor()``. A weight with a ``main_grad`` has its gradient added there (:mod:`real_kernels.main_grad`).
"""

from __future__ import annotations

from typing import Any

import torch

from real_kernels import ops
from real_kernels.checks import check_index, check_score_ids, check_shape
from real_kernels.main_grad import main_grad_of
from real_kernels.matmul import accum_dtype
from real_kernels.op_results import products
from real_kernels.options import DEFAULT_HEAD, HeadOptions
from real_kernels.resolve import gradient_in_forward, required_grads, resolve_head


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    head: HeadOptions = DEFAULT_HEAD,
) -> torch.Tensor:
    """Log-probability of one target token per row: ``log_softmax(hidden @ weight.T / temperature)[targets]``.

    Differentiable in `hidden`, `weight` and `bias` for any upstream gradient; the backward pass computes the logits
    again (8 N D V FLOPs for forward and backward together), whatever ``head.mode`` says.

    Args:
        hidden: [N, D] hidden states; float16, bfloat16, float32 or float64.
        weight: [V, D] weight of the lm_head, same dtype and device.
        targets: [N] int64 token ids.
        bias: [V] of the lm_head, same dtype and device; None for none.
        head: How the head computes.

    Returns:
        [N] log-probabilities in nats, float32 (float64 for float64 input).

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, or a target outside the vocabulary.
    """
    impl, chunk_bytes = resolve_head(hidden, weight, bias, head)
    check_index("targets", targets, (hidden.shape[0],), hidden.device)
    logp: torch.Tensor
    logp, *_ = _selected(hidden, weight, bias, targets, False, False, head.text, impl, chunk_bytes)
    return logp[:, 0]


def logprob_and_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    head: HeadOptions = DEFAULT_HEAD,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`linear_logprob`, and each row's entropy over the vocabulary, from the same pass.

    Args:
        hidden: [N, D] hidden states.
        weight: [V, D] weight of the lm_head, same dtype and device.
        targets: [N] int64 token ids.
        bias: [V] of the lm_head, same dtype and device; None for none.
        head: How the head computes.

    Returns:
        [N] log-probabilities, differentiable, and [N] entropies in nats, detached: a metric, not a bonus. Both float32
        (float64 for float64 input).

    Raises:
        ValueError: As :func:`linear_logprob`.
    """
    impl, chunk_bytes = resolve_head(hidden, weight, bias, head)
    check_index("targets", targets, (hidden.shape[0],), hidden.device)
    logp, _row_max, _log_sum, entropy = _selected(
        hidden, weight, bias, targets, False, True, head.text, impl, chunk_bytes
    )
    return logp[:, 0], entropy


def score_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    score_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    head: HeadOptions = DEFAULT_HEAD,
) -> torch.Tensor:
    """Log-probabilities of the K score tokens per score row, by the full-vocabulary softmax.

    Args:
        hidden: [M, D] hidden states of the score rows (the last token of the phrase).
        weight: [V, D] weight of the lm_head, same dtype and device.
        score_ids: [K] int64, different token ids.
        bias: [V] of the lm_head, same dtype and device; None for none.
        head: How the head computes. The RAIL prediction is made at temperature 1.

    Returns:
        [M, K] log-probabilities in nats, float32 (float64 for float64 input), differentiable; they do not sum to 1 in
        probability, the rest is off-scale mass.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, ids outside the vocabulary or twice.
    """
    impl, chunk_bytes = resolve_head(hidden, weight, bias, head)
    check_score_ids(score_ids, hidden.device)
    logp: torch.Tensor
    logp, *_ = _selected(hidden, weight, bias, score_ids, True, False, head.text, impl, chunk_bytes)
    return logp


def weighted_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    coefficients: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    head: HeadOptions = DEFAULT_HEAD,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of coefficient times log-probability; the coefficients are constants.

    So the gradient is known as soon as a chunk's logits are, and ``head.mode="forward"`` computes it there: 6 N D V
    FLOPs instead of the 8 of "recompute", which needs no sum of weight gradients in float32. "auto" takes "forward"
    unless ``head.chunk_bytes`` cuts the rows into chunks too small to be worth it. Cross-entropy is
    ``coefficients = -1 / N``.

    Args:
        hidden: [N, D] hidden states.
        weight: [V, D] weight of the lm_head, same dtype and device.
        targets: [N] int64 token ids.
        coefficients: [N] float32 (float64 for float64 input) constants; no gradient flows to them.
        bias: [V] of the lm_head, same dtype and device; None for none.
        head: How the head computes.

    Returns:
        The sum (a differentiable scalar) and the [N] log-probabilities in nats, detached; both float32 (float64 for
        float64 input).

    Raises:
        ValueError: As :func:`linear_logprob`, and for coefficients that require a gradient.
    """
    impl, chunk_bytes = resolve_head(hidden, weight, bias, head)
    check_index("targets", targets, (hidden.shape[0],), hidden.device)
    check_shape("coefficients", coefficients, (hidden.shape[0],), hidden.device)
    if coefficients.requires_grad:
        raise ValueError("coefficients require a gradient, and none flows to them: detach them")
    if coefficients.dtype != accum_dtype(hidden.dtype):
        raise ValueError(f"coefficients must be {accum_dtype(hidden.dtype)}, not {coefficients.dtype}")
    if not gradient_in_forward(head, impl, chunk_bytes, weight, hidden.shape[0]):
        logp = linear_logprob(hidden, weight, targets, bias=bias, head=head)
        return products(coefficients, logp), logp.detach()
    required, main_grad = required_grads(hidden, weight, bias), main_grad_of(weight)
    inputs = (hidden, weight, bias, targets, coefficients, head.text, impl, chunk_bytes, *required)
    if main_grad is None:
        total, logp, *_ = ops.weighted_logprob(*inputs)
    else:
        total, logp, *_ = ops.weighted_logprob_adding(*inputs, main_grad)
    return total, logp


def _selected(hidden: torch.Tensor, weight: torch.Tensor, *others: Any) -> tuple[torch.Tensor, ...]:
    """The operator that serves every function of selected tokens."""
    main_grad = main_grad_of(weight)
    found: tuple[torch.Tensor, ...] = (
        ops.selected_logprobs(hidden, weight, *others)
        if main_grad is None
        else ops.selected_logprobs_adding(hidden, weight, *others, main_grad)
    )
    return found
