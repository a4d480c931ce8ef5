"""The head as ``torch.library`` operators: torch.compile and FSDP2 see each as one opaque operator.

Every operator has a fake implementation (shapes alone) and its gradient. Values are checked inside them, before any
kernel runs, so that the checks hold in compiled code too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from real_kernels.checks import ValueChecks
from real_kernels.head import Needs, make_head, recomputed_gradients, statistics, weighted_in_forward
from real_kernels.op_results import fake_gradients, or_none, products, scaled, tensors, wanted, wide
from real_kernels.rows import Rows, Stats


@torch.library.custom_op("real_kernels::selected_logprobs", mutates_args=())
def selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    shared: bool,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    impl: str,
    chunk_bytes: int,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities [n, m], the row maxima [n], what the log-sum-exp adds to them [n], and the entropy [n]."""
    if validate:
        checks = ValueChecks()
        checks.ids("score_ids" if shared else "targets", ids, weight.shape[0])
        if shared:
            checks.different("score_ids", ids)
        checks.run()
    head, ids = make_head(impl, weight, bias, softcap, chunk_bytes), ids.contiguous()
    stats = statistics(head, Rows(hidden, ids, shared, temperature), entropy)
    return stats.logp, stats.row_max, stats.log_sum, or_none(stats.entropy, stats.logp)


@selected_logprobs.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    shared: bool,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    impl: str,
    chunk_bytes: int,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = hidden.shape[0]
    logp = wide(hidden, n, ids.shape[0] if shared else 1)
    return logp, wide(hidden, n), wide(hidden, n), wide(hidden, n if entropy else 0)


@torch.library.custom_op("real_kernels::selected_logprobs_backward", mutates_args=())
def selected_logprobs_backward(
    u: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    logp: Tensor,
    shared: bool,
    temperature: float,
    softcap: float | None,
    impl: str,
    chunk_bytes: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias for u = dL/dlogp [n, m]."""
    head = make_head(impl, weight, bias, softcap, chunk_bytes)
    rows = Rows(hidden, ids.contiguous(), shared, temperature)
    needs = Needs(need_hidden, need_weight, need_bias)
    return tensors(recomputed_gradients(head, [(rows, Stats(row_max, log_sum, logp), u.contiguous())], needs), weight)


@selected_logprobs_backward.register_fake
def _(
    u: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    logp: Tensor,
    shared: bool,
    temperature: float,
    softcap: float | None,
    impl: str,
    chunk_bytes: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(hidden.shape[0], weight, Needs(need_hidden, need_weight, need_bias))


def _save_selected(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, ids, *ctx.options = inputs
    logp, row_max, log_sum, entropy = output
    ctx.mark_non_differentiable(row_max, log_sum, entropy)
    ctx.save_for_backward(hidden, weight, bias, ids, row_max, log_sum, logp)


def _selected_backward(ctx: Any, u: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    shared, temperature, softcap, _entropy, impl, chunk_bytes, _validate = ctx.options
    needs = Needs(*ctx.needs_input_grad[:3])
    gradients = torch.ops.real_kernels.selected_logprobs_backward(
        u, *ctx.saved_tensors, shared, temperature, softcap, impl, chunk_bytes, *needs
    )
    return (*wanted(gradients, needs), *[None] * 8)


selected_logprobs.register_autograd(_selected_backward, setup_context=_save_selected)


@torch.library.custom_op("real_kernels::weighted_logprob", mutates_args=())
def weighted_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    coefficients: Tensor,
    temperature: float,
    softcap: float | None,
    impl: str,
    chunk_bytes: int,
    validate: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The weighted sum, the log-probabilities [n], and the sum's gradients."""
    if validate:
        checks = ValueChecks()
        checks.ids("targets", targets, weight.shape[0])
        checks.run()
    head = make_head(impl, weight, bias, softcap, chunk_bytes)
    needs = Needs(need_hidden, need_weight, need_bias)
    rows = Rows(hidden, targets.contiguous(), False, temperature)
    logp, gradients = weighted_in_forward(head, rows, coefficients.contiguous(), needs)
    return products(coefficients, logp), logp.contiguous(), *tensors(gradients, weight)


@weighted_logprob.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    coefficients: Tensor,
    temperature: float,
    softcap: float | None,
    impl: str,
    chunk_bytes: int,
    validate: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = hidden.shape[0]
    needs = Needs(need_hidden, need_weight, need_bias)
    return wide(hidden), wide(hidden, n), *fake_gradients(n, weight, needs)


def _save_weighted(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *others = output
    # Otherwise autograd would make zeros of the size of every gradient among the outputs.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(*others[1:])
    ctx.impl = inputs[7]


def _weighted_backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    gradients = scaled(ctx.saved_tensors, grad, ctx.needs_input_grad[:3], ctx.impl)
    return (*gradients, *[None] * 10)


weighted_logprob.register_autograd(_weighted_backward, setup_context=_save_weighted)
