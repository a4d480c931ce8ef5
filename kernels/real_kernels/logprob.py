"""Log-probabilities of a few tokens per row from hidden states and the lm_head's weight, in bounded memory.

A row of hidden states h has m selected tokens s_1..s_m with l_k = log softmax(h W^T / T)[s_k]. Whatever the loss is, it
sees the row only through them, and with u_k = dL/dl_k and U = sum_k u_k

    dL/dz_v = -U p_v + sum_k u_k 1[v = s_k]

The selected columns are written as -u_k expm1(l_k) - p_k sum_{j != k} u_j, which does not cancel where p_k is near 1.
Logits are float32 for every 16-bit input (16-bit logits of magnitude 16 to 32 are off by up to 6 % in p).

Arguments that all functions here share:

- `bias`: [V] of the lm_head, same dtype as `weight`. `softcap`: logits become ``softcap * tanh(logits / softcap)``, as
  in Gemma 2; before the temperature.
- `impl`: "triton" (CUDA; float16, bfloat16, float32), "torch" (every device and dtype), or "auto": Triton for 16-bit
  tensors on CUDA, PyTorch otherwise.
- `chunk_bytes`: most bytes of logits (or of their gradients) alive at a time; at least one row's are. 256 MiB by
  default, 1 GiB for Triton.
- `validate`: check values too, such as ids within the vocabulary. All of them wait for a GPU once: False when the
  caller has made sure of them.

Gradients: a frozen weight or frozen hidden states cost nothing, so under LoRA with a frozen head no dW is computed
(an adapter on the lm_head itself must be merged into `weight` by the caller, and gets its gradient through that). A
tied head gets its gradient here and the embedding's elsewhere, both added up by autograd. A sharded weight (FSDP2's
DTensor) must be whole where it is used: call the loss inside the ``forward`` of the module that FSDP2 wraps, or pass
``weight.full_tensor()``.
"""

from __future__ import annotations

import torch

from real_kernels import ops
from real_kernels.checks import check_index, check_score_ids, check_shape
from real_kernels.head import Impl, Mode
from real_kernels.matmul import accumulator
from real_kernels.op_results import products
from real_kernels.options import check_options, gradient_in_forward, wanted


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    impl: Impl = "auto",
    chunk_bytes: int | None = None,
    validate: bool = True,
) -> torch.Tensor:
    """Log-probability of one target token per row: ``log_softmax(hidden @ weight.T / temperature)[targets]``.

    Differentiable in `hidden`, `weight` and `bias` for any upstream gradient; the backward pass computes the logits
    again (8 N D V FLOPs for forward and backward together).

    Args:
        hidden: [N, D] hidden states; float16, bfloat16, float32 or float64.
        weight: [V, D] weight of the lm_head, same dtype and device.
        targets: [N] int64 token ids.
        bias: See the module, as for all that follow.
        temperature: Divides the logits.
        softcap: Caps the logits.
        impl: Which implementation.
        chunk_bytes: Bound on memory.
        validate: Check values.

    Returns:
        [N] log-probabilities in nats, float32 (float64 for float64 input).

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, or a target outside the vocabulary.
    """
    chosen, room = check_options(hidden, weight, bias, temperature, softcap, impl, chunk_bytes)
    check_index("targets", targets, (hidden.shape[0],), hidden.device)
    logp: torch.Tensor
    logp, *_ = ops.selected_logprobs(
        hidden, weight, bias, targets, False, temperature, softcap, False, chosen, room, validate
    )
    return logp[:, 0]


def logprob_and_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    impl: Impl = "auto",
    chunk_bytes: int | None = None,
    validate: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`linear_logprob`, and each row's entropy over the vocabulary, from the same pass.

    Returns:
        [N] log-probabilities, differentiable, and [N] entropies in nats, detached: a metric, not a bonus.
    """
    chosen, room = check_options(hidden, weight, bias, temperature, softcap, impl, chunk_bytes)
    check_index("targets", targets, (hidden.shape[0],), hidden.device)
    logp, _, _, entropy = ops.selected_logprobs(
        hidden, weight, bias, targets, False, temperature, softcap, True, chosen, room, validate
    )
    return logp[:, 0], entropy


def score_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    score_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    impl: Impl = "auto",
    chunk_bytes: int | None = None,
    validate: bool = True,
) -> torch.Tensor:
    """Log-probabilities of the K score tokens per score row, by the full-vocabulary softmax.

    Args:
        hidden: [M, D] hidden states of the score rows (the last token of the phrase).
        weight: [V, D] weight of the lm_head, same dtype and device.
        score_ids: [K] int64, different token ids.
        bias: See the module, as for all that follow.
        temperature: Divides the logits; the RAIL prediction uses 1.
        softcap: Caps the logits.
        impl: Which implementation.
        chunk_bytes: Bound on memory.
        validate: Check values.

    Returns:
        [M, K] log-probabilities in nats, float32 (float64 for float64 input); they do not sum to 1 in probability, the
        rest is off-scale mass.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, ids outside the vocabulary or twice.
    """
    chosen, room = check_options(hidden, weight, bias, temperature, softcap, impl, chunk_bytes)
    check_score_ids(score_ids, hidden.device)
    logp: torch.Tensor
    logp, *_ = ops.selected_logprobs(
        hidden, weight, bias, score_ids, True, temperature, softcap, False, chosen, room, validate
    )
    return logp


def weighted_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    coefficients: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    impl: Impl = "auto",
    mode: Mode = "auto",
    chunk_bytes: int | None = None,
    validate: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of coefficient times log-probability; the coefficients are constants.

    So the gradient is known as soon as a chunk's logits are, and ``mode="forward"`` computes it there: 6 N D V FLOPs
    instead of the 8 of "recompute", which needs no sum of weight gradients in float32. "auto" takes "forward" unless
    `chunk_bytes` cuts the rows into chunks too small to be worth it. Cross-entropy is ``coefficients = -1 / N``.

    Args:
        hidden: [N, D] hidden states.
        weight: [V, D] weight of the lm_head, same dtype and device.
        targets: [N] int64 token ids.
        coefficients: [N] float32 (float64 for float64 input) constants; no gradient flows to them.
        bias: See the module, as for all that follow.
        temperature: Divides the logits.
        softcap: Caps the logits.
        impl: Which implementation.
        mode: Where the gradient is computed.
        chunk_bytes: Bound on memory.
        validate: Check values.

    Returns:
        The sum (a scalar) and the [N] log-probabilities, detached.

    Raises:
        ValueError: As :func:`linear_logprob`, and for coefficients that require a gradient.
    """
    chosen, room = check_options(hidden, weight, bias, temperature, softcap, impl, chunk_bytes)
    check_index("targets", targets, (hidden.shape[0],), hidden.device)
    check_shape("coefficients", coefficients, (hidden.shape[0],), hidden.device)
    if coefficients.requires_grad:
        raise ValueError("coefficients require a gradient, and none flows to them: detach them")
    if coefficients.dtype != accumulator(hidden.dtype):
        raise ValueError(f"coefficients must be {accumulator(hidden.dtype)}, not {coefficients.dtype}")
    if not gradient_in_forward(mode, chosen, weight, softcap, room, hidden.shape[0]):
        logp = linear_logprob(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            impl=impl,
            chunk_bytes=room,
            validate=validate,
        )
        return products(coefficients, logp), logp.detach()
    total, logp, *_ = ops.weighted_logprob(
        hidden,
        weight,
        bias,
        targets,
        coefficients,
        temperature,
        softcap,
        chosen,
        room,
        validate,
        *wanted(hidden, weight, bias),
    )
    return total, logp
