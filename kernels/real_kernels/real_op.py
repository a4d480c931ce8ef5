"""The operator behind :func:`real_kernels.real_loss`: one forward pass from hidden states to the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from real_kernels.checks import ValueChecks
from real_kernels.head import Needs, make_head, real_forward, recomputed_gradients
from real_kernels.op_results import fake_gradients, none, or_none, products, scaled, spread, wide
from real_kernels.rollout_terms import RolloutOptions, rollout_terms
from real_kernels.rows import Rows, Stats

RealTensors = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]


@torch.library.custom_op("real_kernels::real_head", mutates_args=())
def real_head(
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
    valid: Tensor | None,
    reward_logprobs: Tensor | None,
    reward: str,
    lam: float,
    beta: float,
    baseline: str,
    normalize_std: bool,
    advantage_clip: float,
    loss_norm: str,
    renormalize: bool,
    temperature: float,
    softcap: float | None,
    num_rollouts: float | None,
    num_tokens: float | None,
    drop_zero_rows: bool,
    in_forward: bool,
    impl: str,
    chunk_bytes: int,
    validate: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> RealTensors:
    """All of :func:`real_kernels.real_loss`.

    Returns:
        The loss and its exploration part; log-probabilities [N] and which rows were computed [N]; score
        log-probabilities [M, K]; expected scores, rewards and advantages [3, M]; then for the backward pass either the
        gradients of hidden, score_hidden, weight and bias, or text rows [3, N] (maximum, log-sum, coefficient), score
        rows [2, M] and u [M, K].
    """
    if validate:
        checks = ValueChecks()
        checks.ids("targets", targets, weight.shape[0])
        checks.ids("rollout", rollout, score_hidden.shape[0])
        checks.ids("score_ids", score_ids, weight.shape[0])
        checks.different("score_ids", score_ids)
        checks.scale(score_values, labels)
        checks.run()
    m, device, dtype = labels.shape[0], labels.device, labels.dtype
    head = make_head(impl, weight, bias, softcap, chunk_bytes)
    options: Any = (reward, lam, beta, baseline, normalize_std, advantage_clip, loss_norm, renormalize)
    options = RolloutOptions(*options)
    live = None if valid is None else valid.index_select(0, rollout)
    usable = torch.ones(m, dtype=torch.bool, device=device) if valid is None else valid
    counts = torch.empty(2, dtype=dtype, device=device)
    for place, given, counted in ((0, num_rollouts, usable), (1, num_tokens, live)):
        if given is not None:
            counts[place].fill_(given)
        elif counted is not None:
            counts[place] = counted.sum().clamp(min=1)
        else:
            counts[place].fill_(max(targets.shape[0], 1))
    if impl == "triton":
        from real_kernels.triton_head import rollout_terms as terms_function
    else:
        terms_function = rollout_terms

    def terms_of(logp: Tensor) -> Any:
        judged = logp if reward_logprobs is None else reward_logprobs
        return terms_function(logp, judged, score_values, labels, group, usable, counts, options)

    needs = Needs(need_hidden, need_weight, need_bias)
    score = Rows(_valid_rows(score_hidden, valid), score_ids.contiguous(), True)
    text = Rows(hidden, targets.contiguous(), False, temperature)
    out = real_forward(head, score, text, terms_of, rollout, live, drop_zero_rows, in_forward, needs)
    terms, n = out.terms, hidden.shape[0]
    weights = out.coefficients if out.index is None else out.coefficients.index_select(0, out.index)
    exploration = products(weights, out.logp)
    logprobs, computed = spread(out.logp, out.index, n, float("nan")), torch.ones(n, dtype=torch.bool, device=device)
    if out.index is not None:
        computed = torch.zeros_like(computed).index_fill_(0, out.index, True)
    results = (
        exploration + terms.refinement.sum(),
        exploration,
        logprobs,
        computed,
        out.score.logp,
        torch.stack([terms.expected_score, terms.reward, terms.advantages]),
    )
    saved: list[Tensor] = []
    if out.gradients is not None:
        dh, dw, db = out.gradients
        saved += [none(weight), none(weight)]
        if dh is not None:
            saved = list(_split(dh, m, out.index, n))
        saved += [or_none(dw, weight), or_none(db, weight), *(none(labels) for _ in range(3))]
    else:
        saved += [none(weight) for _ in range(4)]
        if needs.any and out.text is not None:
            of_text = (out.text.row_max, out.text.log_sum, weights)
            saved.append(torch.stack([spread(x, out.index, n, 0.0) for x in of_text]))
            saved += [torch.stack([out.score.row_max, out.score.log_sum]), terms.u.clone()]
        else:
            saved += [none(labels) for _ in range(3)]
    return (*results, *saved)  # type: ignore[return-value]


@real_head.register_fake
def _(hidden: Tensor, score_hidden: Tensor, weight: Tensor, *arguments: Any) -> RealTensors:
    score_ids, labels = arguments[3], arguments[5]
    in_forward, needs = arguments[22], Needs(*arguments[26:])
    n, m, k = hidden.shape[0], labels.shape[0], score_ids.shape[0]
    computed = hidden.new_empty(n, dtype=torch.bool)
    results = (wide(hidden), wide(hidden), wide(hidden, n), computed, wide(hidden, m, k), wide(hidden, 3, m))
    drop_zero_rows, valid = arguments[21], arguments[7]
    dh, dw, db = fake_gradients(n, weight, needs if in_forward else Needs(False, False, False))
    ds = none(weight)
    if in_forward and needs.hidden:
        dh, ds = _fake_split(weight, n, m, not drop_zero_rows and valid is None)
    if needs.any and not in_forward:
        saved = (wide(hidden, 3, n), wide(hidden, 2, m), wide(hidden, m, k))
    else:
        saved = (wide(hidden, 0), wide(hidden, 0), wide(hidden, 0))
    return (*results, dh, ds, dw, db, *saved)


@torch.library.custom_op("real_kernels::real_head_backward", mutates_args=())
def real_head_backward(
    hidden: Tensor,
    score_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    score_ids: Tensor,
    computed: Tensor,
    logprobs: Tensor,
    score_logp: Tensor,
    of_text: Tensor,
    of_score: Tensor,
    u: Tensor,
    valid: Tensor | None,
    grad: Tensor,
    every_row: bool,
    temperature: float,
    softcap: float | None,
    impl: str,
    chunk_bytes: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, score_hidden, weight and bias of :func:`real_head`, computed again."""
    head = make_head(impl, weight, bias, softcap, chunk_bytes)
    n, m = hidden.shape[0], score_hidden.shape[0]
    index = None
    if not every_row:
        index = computed.nonzero()[:, 0]
        hidden, targets = hidden.index_select(0, index), targets.index_select(0, index)
        of_text, logprobs = of_text.index_select(1, index), logprobs.index_select(0, index)
    text = Rows(hidden, targets.contiguous(), False, temperature)
    stats = Stats(of_text[0], of_text[1], logprobs[:, None])
    score = Rows(_valid_rows(score_hidden, valid), score_ids.contiguous(), True)
    score_stats = Stats(of_score[0], of_score[1], score_logp)
    parts = [(score, score_stats, u * grad), (text, stats, (of_text[2] * grad)[:, None])]
    dh, dw, db = recomputed_gradients(head, parts, Needs(need_hidden, need_weight, need_bias))
    split = (none(weight), none(weight)) if dh is None else _split(dh, m, index, n)
    return (*split, or_none(dw, weight), or_none(db, weight))


@real_head_backward.register_fake
def _(hidden: Tensor, score_hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs, every_row = Needs(*arguments[-3:]), arguments[11]
    dh, dw, db = fake_gradients(hidden.shape[0], weight, needs)
    ds = none(weight)
    if needs.hidden:
        dh, ds = _fake_split(weight, hidden.shape[0], score_hidden.shape[0], every_row)
    return dh, ds, dw, db


def _valid_rows(score_hidden: Tensor, valid: Tensor | None) -> Tensor:
    # 0 times what a left-out rollout holds must be 0 in the products too, be it NaN.
    return score_hidden if valid is None else score_hidden.masked_fill(~valid[:, None], 0.0)


def _split(dx: Tensor, m: int, index: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """Gradients of text rows and of score rows, out of [score rows, computed text rows]."""
    text = spread(dx[m:], index, n, 0.0)
    aligned = index is not None or m * dx.shape[1] * dx.element_size() % 16 == 0
    return text if aligned else text.clone(), dx[:m].clone()


def _fake_split(weight: Tensor, n: int, m: int, every_row: bool) -> tuple[Tensor, Tensor]:
    """Shapes and offsets of :func:`_split`."""
    d = weight.shape[1]
    if every_row and m * d * weight.element_size() % 16 == 0:
        return weight.new_empty(m + n, d)[m:], weight.new_empty(m, d)
    return weight.new_empty(n, d), weight.new_empty(m, d)


def _save_real(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, score_hidden, weight, bias, targets, _rollout, score_ids, *rest = inputs
    _loss, *others = output
    # Otherwise autograd would make zeros of the size of every gradient among the outputs.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*others)
    ctx.in_forward, ctx.inputs = rest[18], len(inputs)
    valid, drop_zero_rows, ctx.impl = rest[3], rest[17], rest[19]
    ctx.options = (valid is None and not drop_zero_rows, rest[13], rest[14], rest[19], rest[20])
    _, logprobs, computed, score_logp, _, *saved = others
    if ctx.in_forward:
        ctx.save_for_backward(*saved[:4])
    else:
        ctx.save_for_backward(
            hidden, score_hidden, weight, bias, targets, score_ids, computed, logprobs, score_logp, *saved[4:], valid
        )


def _real_backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    if grad is None:
        return tuple([None] * ctx.inputs)
    of_hidden, of_scores, of_weight, of_bias = ctx.needs_input_grad[:4]
    wanted = (of_hidden, of_scores, of_weight, of_bias)
    if ctx.in_forward:
        own = scaled(ctx.saved_tensors, grad, wanted, ctx.impl)
    else:
        gradients = torch.ops.real_kernels.real_head_backward(
            *ctx.saved_tensors, grad, *ctx.options, of_hidden or of_scores, of_weight, of_bias
        )
        own = [g if want else None for g, want in zip(gradients, wanted, strict=True)]
    return (*own, *[None] * (ctx.inputs - 4))


real_head.register_autograd(_real_backward, setup_context=_save_real)
