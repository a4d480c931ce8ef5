"""The operator behind :func:`real_kernels.real_loss`: one forward pass from hidden states to the loss.

`objective` and `head` are the texts of a :class:`real_kernels.RealObjective` and a :class:`real_kernels.HeadOptions`.
`in_forward`, `impl` and `chunk_bytes` are what :mod:`real_kernels.resolve` made of the head's fields `mode`, `impl` and
`chunk_bytes`, which play no part here. What changes from step to step is a number of its own: a string that changes
would have torch.compile compile again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from real_kernels.checks import ValueChecks
from real_kernels.head import GradMask, RealForward, make_backend, real_forward, recomputed_gradients
from real_kernels.main_grad import adding
from real_kernels.op_results import (
    empty_accum,
    fake_gradients,
    inputs_of,
    mask_grads,
    none,
    or_none,
    products,
    scaled,
    spread,
)
from real_kernels.options import HeadOptions, RealObjective
from real_kernels.rollout_coefficients import RolloutCoefficients, rollout_coefficients
from real_kernels.rows import Rows, SoftmaxStats

RealTensors = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]


class RealResults(NamedTuple):
    """What :func:`real_head` returns; those of the backward pass are empty where it does not need them.

    Attributes:
        loss: Scalar, the one that has a gradient.
        exploration_loss: Scalar, the policy-gradient part of it.
        logprobs: [N] log-probabilities of the targets, NaN for rows that were not computed.
        computed: [N] bool.
        score_logprobs: [M, K] score log-probabilities.
        rollouts: [3, M] expected scores, rewards and advantages.
        d_hidden: [N, D] gradient, as are the three that follow, where it is computed in the forward pass.
        d_score_hidden: [M, D].
        d_weight: [V, D].
        d_bias: [V].
        text_stats: [3, N] maximum, log-sum and coefficient of the text rows, where the backward pass recomputes.
        score_stats: [2, M] maximum and log-sum of the score rows, likewise.
        dlogp: [M, K] derivative of the loss with respect to the score log-probabilities, likewise.
    """

    loss: Tensor
    exploration_loss: Tensor
    logprobs: Tensor
    computed: Tensor
    score_logprobs: Tensor
    rollouts: Tensor
    d_hidden: Tensor
    d_score_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor
    text_stats: Tensor
    score_stats: Tensor
    dlogp: Tensor


def _real_head(
    hidden: Tensor,
    score_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rollout: Tensor,
    score_ids: Tensor,
    score_values: Tensor,
    labels: Tensor,
    group: Tensor,
    rollout_valid: Tensor | None,
    engine_score_logprobs: Tensor | None,
    objective: str,
    head: str,
    in_forward: bool,
    impl: str,
    chunk_bytes: int,
    num_rollouts: int | None,
    num_tokens: int | None,
    skip_zero_rows: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> RealTensors:
    """All of :func:`real_kernels.real_loss`; returns :class:`RealResults`."""
    return _forward(RealInputs(**locals()), None)


def _forward(call: Any, main_grad: Tensor | None) -> RealTensors:
    options = HeadOptions.from_text(call.head)
    needs = GradMask(call.need_hidden, call.need_weight, call.need_bias)
    weight, labels, rollout_valid, n = call.weight, call.labels, call.rollout_valid, call.targets.shape[0]
    if options.validate:
        _check_values(call.targets, call.rollout, call.score_ids, call.score_values, labels, weight.shape[0])
    row_valid = None if rollout_valid is None else rollout_valid.index_select(0, call.rollout)
    counted = rollout_valid
    if counted is None:
        counted = torch.ones(labels.shape[0], dtype=torch.bool, device=labels.device)
    counts = _counts(call.num_rollouts, call.num_tokens, counted, row_valid, n, labels)

    def coefficients_of(logp: Tensor) -> RolloutCoefficients:
        return _coefficients_by(call.impl)(
            logp,
            call.engine_score_logprobs,
            call.score_values,
            labels,
            call.group,
            counted,
            counts,
            RealObjective.from_text(call.objective),
        )

    out = real_forward(
        make_backend(call.impl, weight, call.bias, options.softcap, call.chunk_bytes),
        Rows(_valid_rows(call.score_hidden, rollout_valid), call.score_ids.contiguous(), True),
        Rows(call.hidden, call.targets.contiguous(), False, options.temperature),
        coefficients_of,
        call.rollout,
        row_valid,
        call.skip_zero_rows,
        call.in_forward,
        needs,
        main_grad,
    )
    return tuple(_results(out, n, labels, weight, needs))  # type: ignore[return-value]


RealInputs = inputs_of(_real_head)
real_head = torch.library.custom_op("real_kernels::real_head", _real_head, mutates_args=())


@real_head.register_fake
def _(*inputs: Any) -> RealTensors:
    call = RealInputs(*inputs)
    hidden, weight, needs = call.hidden, call.weight, GradMask(call.need_hidden, call.need_weight, call.need_bias)
    n, m, k = hidden.shape[0], call.labels.shape[0], call.score_ids.shape[0]
    dh, dw, db = fake_gradients(n, weight, needs if call.in_forward else GradMask(False, False, False))
    ds = none(weight)
    if call.in_forward and needs.hidden:
        dh, ds = _fake_split(weight, n, m, _all_rows(call.skip_zero_rows, call.rollout_valid))
    recomputes = needs.any and not call.in_forward
    results = RealResults(
        loss=empty_accum(hidden),
        exploration_loss=empty_accum(hidden),
        logprobs=empty_accum(hidden, n),
        computed=hidden.new_empty(n, dtype=torch.bool),
        score_logprobs=empty_accum(hidden, m, k),
        rollouts=empty_accum(hidden, 3, m),
        d_hidden=dh,
        d_score_hidden=ds,
        d_weight=dw,
        d_bias=db,
        text_stats=empty_accum(hidden, 3, n) if recomputes else empty_accum(hidden, 0),
        score_stats=empty_accum(hidden, 2, m) if recomputes else empty_accum(hidden, 0),
        dlogp=empty_accum(hidden, m, k) if recomputes else empty_accum(hidden, 0),
    )
    return tuple(results)  # type: ignore[return-value]


def _real_head_backward(
    hidden: Tensor,
    score_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    score_ids: Tensor,
    rollout_valid: Tensor | None,
    computed: Tensor,
    logprobs: Tensor,
    score_logprobs: Tensor,
    text_stats: Tensor,
    score_stats: Tensor,
    dlogp: Tensor,
    grad: Tensor,
    head: str,
    impl: str,
    chunk_bytes: int,
    skip_zero_rows: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, score_hidden, weight and bias of :func:`real_head`, computed again."""
    return _again(RealBackwardInputs(**locals()), None)


def _again(call: Any, main_grad: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = HeadOptions.from_text(call.head)
    needs = GradMask(call.need_hidden, call.need_weight, call.need_bias)
    hidden, targets, text_stats, logprobs = call.hidden, call.targets, call.text_stats, call.logprobs
    weight, n, m, index = call.weight, hidden.shape[0], call.score_hidden.shape[0], None
    if not _all_rows(call.skip_zero_rows, call.rollout_valid):
        index = call.computed.nonzero()[:, 0]
        hidden, targets = hidden.index_select(0, index), targets.index_select(0, index)
        text_stats, logprobs = text_stats.index_select(1, index), logprobs.index_select(0, index)
    row_max, log_sum, coefficients = text_stats.unbind(0)
    text = Rows(hidden, targets.contiguous(), False, options.temperature)
    text_part = (text, SoftmaxStats(row_max, log_sum, logprobs[:, None]), (coefficients * call.grad)[:, None])
    row_max, log_sum = call.score_stats.unbind(0)
    score = Rows(_valid_rows(call.score_hidden, call.rollout_valid), call.score_ids.contiguous(), True)
    score_part = (score, SoftmaxStats(row_max, log_sum, call.score_logprobs), call.dlogp * call.grad)
    backend = make_backend(call.impl, weight, call.bias, options.softcap, call.chunk_bytes)
    dh, dw, db = recomputed_gradients(backend, [score_part, text_part], needs, main_grad)
    split = (none(weight), none(weight)) if dh is None else _split(dh, m, index, n)
    return (*split, or_none(dw, weight), or_none(db, weight))


RealBackwardInputs = inputs_of(_real_head_backward)
real_head_backward = torch.library.custom_op("real_kernels::real_head_backward", _real_head_backward, mutates_args=())


@real_head_backward.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = RealBackwardInputs(*inputs)
    weight, n, m = call.weight, call.hidden.shape[0], call.score_hidden.shape[0]
    dh, dw, db = fake_gradients(n, weight, GradMask(call.need_hidden, call.need_weight, call.need_bias))
    ds = none(weight)
    if call.need_hidden:
        dh, ds = _fake_split(weight, n, m, _all_rows(call.skip_zero_rows, call.rollout_valid))
    return dh, ds, dw, db


def _check_values(
    targets: Tensor, rollout: Tensor, score_ids: Tensor, score_values: Tensor, labels: Tensor, vocabulary: int
) -> None:
    checks = ValueChecks()
    checks.ids("targets", targets, vocabulary)
    checks.ids("rollout", rollout, labels.shape[0])
    checks.ids("score_ids", score_ids, vocabulary)
    checks.different("score_ids", score_ids)
    checks.scale(score_values, labels)
    checks.run()


def _counts(
    num_rollouts: int | None,
    num_tokens: int | None,
    counted: Tensor,
    row_valid: Tensor | None,
    n: int,
    labels: Tensor,
) -> Tensor:
    """[2] rollouts and tokens of the update, in the labels' dtype: as given, or this call's, and at least 1."""
    counts = torch.empty(2, dtype=labels.dtype, device=labels.device)
    rollouts, tokens = counts.unbind(0)
    if num_rollouts is not None:
        rollouts.fill_(num_rollouts)
    else:
        rollouts.copy_(counted.sum().clamp(min=1))
    if num_tokens is not None:
        tokens.fill_(num_tokens)
    elif row_valid is not None:
        tokens.copy_(row_valid.sum().clamp(min=1))
    else:
        tokens.fill_(max(n, 1))
    return counts


def _coefficients_by(impl: str) -> Callable[..., RolloutCoefficients]:
    """The implementation's function from score log-probabilities to coefficients."""
    if impl != "triton":
        return rollout_coefficients
    from real_kernels import triton_head

    return triton_head.rollout_coefficients


def _results(out: RealForward, n: int, labels: Tensor, weight: Tensor, needs: GradMask) -> RealResults:
    """The forward pass as the operator returns it, with all N rows in their places."""
    rollouts, m = out.rollouts, labels.shape[0]
    coefficients = out.coefficients if out.index is None else out.coefficients.index_select(0, out.index)
    exploration = products(coefficients, out.logp)
    computed = torch.ones(n, dtype=torch.bool, device=labels.device)
    if out.index is not None:
        computed = torch.zeros_like(computed).index_fill_(0, out.index, True)
    dh, dw, db = (None, None, None) if out.gradients is None else out.gradients
    d_hidden, d_score_hidden = (none(weight), none(weight)) if dh is None else _split(dh, m, out.index, n)
    text_stats, score_stats, dlogp = none(labels), none(labels), none(labels)
    if out.gradients is None and needs.any and out.text is not None:
        of_text = (out.text.row_max, out.text.log_sum, coefficients)
        text_stats = torch.stack([spread(x, out.index, n, 0.0) for x in of_text])
        score_stats, dlogp = torch.stack([out.score.row_max, out.score.log_sum]), rollouts.dlogp.clone()
    return RealResults(
        loss=exploration + rollouts.refinement.sum(),
        exploration_loss=exploration,
        logprobs=spread(out.logp, out.index, n, float("nan")),
        computed=computed,
        score_logprobs=out.score.logp,
        rollouts=torch.stack([rollouts.expected_score, rollouts.reward, rollouts.advantages]),
        d_hidden=d_hidden,
        d_score_hidden=d_score_hidden,
        d_weight=or_none(dw, weight),
        d_bias=or_none(db, weight),
        text_stats=text_stats,
        score_stats=score_stats,
        dlogp=dlogp,
    )


def _all_rows(skip_zero_rows: bool, rollout_valid: Tensor | None) -> bool:
    """Whether every text row goes through the head, whatever the rewards are."""
    return not skip_zero_rows and rollout_valid is None


def _valid_rows(score_hidden: Tensor, rollout_valid: Tensor | None) -> Tensor:
    # 0 times what a left-out rollout holds must be 0 in the products too, be it NaN.
    return score_hidden if rollout_valid is None else score_hidden.masked_fill(~rollout_valid[:, None], 0.0)


def _split(dx: Tensor, m: int, index: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """Gradients of text rows and of score rows, out of [score rows, computed text rows]."""
    text = spread(dx[m:], index, n, 0.0)
    aligned = index is not None or m * dx.shape[1] * dx.element_size() % 16 == 0
    return text if aligned else text.clone(), dx[:m].clone()


def _fake_split(weight: Tensor, n: int, m: int, all_rows: bool) -> tuple[Tensor, Tensor]:
    """Shapes and offsets of :func:`_split`."""
    d = weight.shape[1]
    if all_rows and m * d * weight.element_size() % 16 == 0:
        return weight.new_empty(m + n, d)[m:], weight.new_empty(m, d)
    return weight.new_empty(n, d), weight.new_empty(m, d)


class _Saved(NamedTuple):
    """What a backward pass that recomputes needs, under the names of :func:`real_head_backward`."""

    hidden: Tensor
    score_hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    score_ids: Tensor
    rollout_valid: Tensor | None
    computed: Tensor
    logprobs: Tensor
    score_logprobs: Tensor
    text_stats: Tensor
    score_stats: Tensor
    dlogp: Tensor


def _save_real(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, out = RealInputs(*inputs), RealResults(*output)
    # Otherwise autograd would make zeros of the size of every gradient among the outputs.
    ctx.set_materialize_grads(False)
    _loss, *others = out
    ctx.mark_non_differentiable(*others)
    ctx.head, ctx.in_forward, ctx.impl, ctx.chunk_bytes = call.head, call.in_forward, call.impl, call.chunk_bytes
    ctx.skip_zero_rows, ctx.unit_gradient = call.skip_zero_rows, HeadOptions.from_text(call.head).unit_gradient
    if call.in_forward:
        ctx.save_for_backward(out.d_hidden, out.d_score_hidden, out.d_weight, out.d_bias)
        return
    saved = _Saved(
        hidden=call.hidden,
        score_hidden=call.score_hidden,
        weight=call.weight,
        bias=call.bias,
        targets=call.targets,
        score_ids=call.score_ids,
        rollout_valid=call.rollout_valid,
        computed=out.computed,
        logprobs=out.logprobs,
        score_logprobs=out.score_logprobs,
        text_stats=out.text_stats,
        score_stats=out.score_stats,
        dlogp=out.dlogp,
    )
    ctx.save_for_backward(*saved)


def _real_backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    if grad is None:
        return tuple(RealInputs())
    main_grad = getattr(ctx, "main_grad", None)
    needed = RealInputs(*ctx.needs_input_grad[: len(RealInputs._fields)])
    required = (needed.hidden, needed.score_hidden, needed.weight and main_grad is None, needed.bias)
    if ctx.in_forward:
        gradients = scaled(ctx, grad, required)
    else:
        call = RealBackwardInputs(
            **_Saved(*ctx.saved_tensors)._asdict(),
            grad=grad,
            head=ctx.head,
            impl=ctx.impl,
            chunk_bytes=ctx.chunk_bytes,
            skip_zero_rows=ctx.skip_zero_rows,
            need_hidden=needed.hidden or needed.score_hidden,
            need_weight=needed.weight,
            need_bias=needed.bias,
        )
        recomputed = torch.ops.real_kernels.real_head_backward(*call) if main_grad is None else _again(call, main_grad)
        gradients = mask_grads(recomputed, required)
    dh, ds, dw, db = gradients
    return tuple(RealInputs(hidden=dh, score_hidden=ds, weight=dw, bias=db))


real_head.register_autograd(_real_backward, setup_context=_save_real)
real_head_adding = adding(lambda *inputs: _forward(RealInputs(*inputs[:-1]), inputs[-1]), _save_real, _real_backward)
