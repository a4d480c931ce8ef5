"""The head as ``torch.library`` operators: torch.compile and FSDP2 see each as one opaque operator.

Every operator has a fake implementation (shapes alone) and its gradient. Values are checked inside them, before any
kernel runs, so that the checks hold in compiled code too.

`head` is the text of a :class:`real_kernels.HeadOptions`. `impl` ("torch" or "triton") and `chunk_bytes` are what
:func:`real_kernels.resolve.resolve_head` made of its fields of the same name, which play no part here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from real_kernels.checks import ValueChecks
from real_kernels.head import GradMask, make_backend, recomputed_gradients, statistics, weighted_in_forward
from real_kernels.main_grad import adding
from real_kernels.op_results import (
    empty_accum,
    fake_gradients,
    inputs_of,
    mask_grads,
    or_none,
    products,
    scaled,
    tensors,
)
from real_kernels.options import HeadOptions
from real_kernels.rows import Rows, SoftmaxStats


def _selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    shared: bool,
    entropy: bool,
    head: str,
    impl: str,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities [n, m], the row maxima [n], what the log-sum-exp adds to them [n], and the entropy [n]."""
    options = HeadOptions.from_text(head)
    if options.validate:
        checks = ValueChecks()
        checks.ids("score_ids" if shared else "targets", ids, weight.shape[0])
        if shared:
            checks.different("score_ids", ids)
        checks.run()
    backend = make_backend(impl, weight, bias, options.softcap, chunk_bytes)
    stats = statistics(backend, Rows(hidden, ids.contiguous(), shared, options.temperature), entropy)
    return stats.logp, stats.row_max, stats.log_sum, or_none(stats.entropy, stats.logp)


SelectedInputs = inputs_of(_selected_logprobs)
selected_logprobs = torch.library.custom_op("real_kernels::selected_logprobs", _selected_logprobs, mutates_args=())


@selected_logprobs.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = SelectedInputs(*inputs)
    hidden, n = call.hidden, call.hidden.shape[0]
    logp = empty_accum(hidden, n, call.ids.shape[0] if call.shared else 1)
    return logp, empty_accum(hidden, n), empty_accum(hidden, n), empty_accum(hidden, n if call.entropy else 0)


def _selected_logprobs_backward(
    dlogp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    logp: Tensor,
    shared: bool,
    head: str,
    impl: str,
    chunk_bytes: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias for dlogp = dL/dlogp [n, m]."""
    return _selected_again(SelectedBackwardInputs(**locals()), None)


def _selected_again(call: Any, main_grad: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    options = HeadOptions.from_text(call.head)
    backend = make_backend(call.impl, call.weight, call.bias, options.softcap, call.chunk_bytes)
    rows = Rows(call.hidden, call.ids.contiguous(), call.shared, options.temperature)
    part = (rows, SoftmaxStats(call.row_max, call.log_sum, call.logp), call.dlogp.contiguous())
    needs = GradMask(call.need_hidden, call.need_weight, call.need_bias)
    return tensors(recomputed_gradients(backend, [part], needs, main_grad), call.weight)


SelectedBackwardInputs = inputs_of(_selected_logprobs_backward)
selected_logprobs_backward = torch.library.custom_op(
    "real_kernels::selected_logprobs_backward", _selected_logprobs_backward, mutates_args=()
)


@selected_logprobs_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = SelectedBackwardInputs(*inputs)
    needs = GradMask(call.need_hidden, call.need_weight, call.need_bias)
    return fake_gradients(call.hidden.shape[0], call.weight, needs)


def _save_selected(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = SelectedInputs(*inputs)
    logp, row_max, log_sum, entropy = output
    ctx.mark_non_differentiable(row_max, log_sum, entropy)
    ctx.save_for_backward(call.hidden, call.weight, call.bias, call.ids, row_max, log_sum, logp)
    ctx.shared, ctx.head, ctx.impl, ctx.chunk_bytes = call.shared, call.head, call.impl, call.chunk_bytes


def _selected_backward(ctx: Any, dlogp: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, ids, row_max, log_sum, logp = ctx.saved_tensors
    main_grad = getattr(ctx, "main_grad", None)
    required = SelectedInputs(*ctx.needs_input_grad[: len(SelectedInputs._fields)])
    needs = GradMask(required.hidden, required.weight, required.bias)
    inputs = (
        dlogp, hidden, weight, bias, ids, row_max, log_sum, logp,
        ctx.shared, ctx.head, ctx.impl, ctx.chunk_bytes, *needs,
    )  # fmt: skip
    if main_grad is None:
        gradients = torch.ops.real_kernels.selected_logprobs_backward(*inputs)
    else:
        gradients = _selected_again(SelectedBackwardInputs(*inputs), main_grad)
    dh, dw, db = mask_grads(gradients, needs._replace(weight=needs.weight and main_grad is None))
    return tuple(SelectedInputs(hidden=dh, weight=dw, bias=db))


selected_logprobs.register_autograd(_selected_backward, setup_context=_save_selected)
selected_logprobs_adding = adding(lambda *inputs: _selected_logprobs(*inputs[:-1]), _save_selected, _selected_backward)


def _weighted_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    coefficients: Tensor,
    head: str,
    impl: str,
    chunk_bytes: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The weighted sum, the log-probabilities [n], and the sum's gradients."""
    return _weighted(WeightedInputs(**locals()), None)


def _weighted(call: Any, main_grad: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = HeadOptions.from_text(call.head)
    if options.validate:
        checks = ValueChecks()
        checks.ids("targets", call.targets, call.weight.shape[0])
        checks.run()
    backend = make_backend(call.impl, call.weight, call.bias, options.softcap, call.chunk_bytes)
    needs = GradMask(call.need_hidden, call.need_weight, call.need_bias)
    rows = Rows(call.hidden, call.targets.contiguous(), False, options.temperature)
    logp, gradients = weighted_in_forward(backend, rows, call.coefficients.contiguous(), needs, main_grad)
    return products(call.coefficients, logp), logp.contiguous(), *tensors(gradients, call.weight)


WeightedInputs = inputs_of(_weighted_logprob)
weighted_logprob = torch.library.custom_op("real_kernels::weighted_logprob", _weighted_logprob, mutates_args=())


@weighted_logprob.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = WeightedInputs(*inputs)
    hidden, n = call.hidden, call.hidden.shape[0]
    needs = GradMask(call.need_hidden, call.need_weight, call.need_bias)
    return empty_accum(hidden), empty_accum(hidden, n), *fake_gradients(n, call.weight, needs)


def _save_weighted(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _total, logp, dh, dw, db = output
    # Otherwise autograd would make zeros of the size of every gradient among the outputs.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(logp, dh, dw, db)
    ctx.save_for_backward(dh, dw, db)
    call = WeightedInputs(*inputs)
    ctx.impl, ctx.unit_gradient = call.impl, HeadOptions.from_text(call.head).unit_gradient


def _weighted_backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    if grad is None:
        return tuple(WeightedInputs())
    main_grad = getattr(ctx, "main_grad", None)
    needed = WeightedInputs(*ctx.needs_input_grad[: len(WeightedInputs._fields)])
    required = (needed.hidden, needed.weight and main_grad is None, needed.bias)
    dh, dw, db = scaled(ctx, grad, required)
    return tuple(WeightedInputs(hidden=dh, weight=dw, bias=db))


weighted_logprob.register_autograd(_weighted_backward, setup_context=_save_weighted)
weighted_logprob_adding = adding(
    lambda *inputs: _weighted(WeightedInputs(*inputs[:-1]), inputs[-1]), _save_weighted, _weighted_backward
)
