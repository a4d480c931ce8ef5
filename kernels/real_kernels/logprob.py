"""Log-probabilities of a few tokens per row from hidden states and the lm_head's weight, in bounded memory.

The plain PyTorch implementation: it runs on every device, and in float64 it is the oracle of every faster one.

A row of hidden states h has m selected tokens s_1..s_m with l_k = log softmax(h W^T / T)[s_k]. Whatever the loss is, it
sees the row only through them, and with u_k = dL/dl_k and U = sum_k u_k

    dL/dz_v = -U p_v + sum_k u_k 1[v = s_k]

The selected columns are written as -u_k expm1(l_k) - p_k sum_{j != k} u_j, which does not cancel where p_k is near 1.
Logits are float32 for every 16-bit input (16-bit logits of magnitude 16 to 32 are off by up to 6 % in p).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from real_kernels.checks import check_head, check_index, check_score_ids, check_shape, check_temperature

CHUNK_BYTES = 256 * 2**20


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
    validate: bool = True,
) -> torch.Tensor:
    """Log-probability of one target token per row: ``log_softmax(hidden @ weight.T / temperature)[targets]``.

    Differentiable in `hidden` and `weight` for any upstream gradient; the backward pass computes the logits again
    (8 N D V FLOPs for forward and backward together). A frozen weight or frozen hidden states cost nothing.

    Args:
        hidden: [N, D] hidden states; float16, bfloat16, float32 or float64.
        weight: [V, D] weight of the lm_head, same dtype and device.
        targets: [N] int64 token ids.
        temperature: Divides the logits.
        chunk_bytes: Most bytes of logits alive at a time; at least one row is.
        validate: Check values too, such as ids within the vocabulary. Each such check waits for a GPU: False once the
            caller has made sure of them.

    Returns:
        [N] log-probabilities in nats, float32 (float64 for float64 input).

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, or a target outside the vocabulary.
    """
    check_head(hidden, weight)
    check_index("targets", targets, (hidden.shape[0],), weight.shape[0], hidden.device, validate)
    check_temperature(temperature)
    result: torch.Tensor = _SelectedLogprobs.apply(hidden, weight, targets[:, None], temperature, chunk_bytes)
    return result[:, 0]


def score_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    score_ids: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
    validate: bool = True,
) -> torch.Tensor:
    """Log-probabilities of the K score tokens per score row, by the full-vocabulary softmax.

    Args:
        hidden: [M, D] hidden states of the score rows (the last token of the phrase).
        weight: [V, D] weight of the lm_head, same dtype and device.
        score_ids: [K] int64, different token ids.
        temperature: Divides the logits; the RAIL prediction uses 1.
        chunk_bytes: Most bytes of logits alive at a time.
        validate: Check values too, such as ids within the vocabulary. Each such check waits for a GPU: False once the
            caller has made sure of them.

    Returns:
        [M, K] log-probabilities in nats, float32 (float64 for float64 input); they do not sum to 1 in probability, the
        rest is off-scale mass.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, ids outside the vocabulary or twice.
    """
    check_head(hidden, weight)
    check_score_ids(score_ids, weight.shape[0], hidden.device, validate)
    check_temperature(temperature)
    ids = score_ids[None, :].expand(hidden.shape[0], -1)
    result: torch.Tensor = _SelectedLogprobs.apply(hidden, weight, ids, temperature, chunk_bytes)
    return result


def weighted_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    coefficients: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
    validate: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of coefficient times log-probability, with the gradient computed in the forward pass.

    The coefficients are constants, so the gradient is known as soon as a chunk's logits are: 6 N D V FLOPs instead of
    the 8 of :func:`linear_logprob`, which serves any other loss. Cross-entropy is ``coefficients = -1 / N``.

    Args:
        hidden: [N, D] hidden states.
        weight: [V, D] weight of the lm_head, same dtype and device.
        targets: [N] int64 token ids.
        coefficients: [N] float32 (float64 for float64 input) constants; no gradient flows to them.
        temperature: Divides the logits.
        chunk_bytes: Most bytes of logits alive at a time.
        validate: Check values too, such as ids within the vocabulary. Each such check waits for a GPU: False once the
            caller has made sure of them.

    Returns:
        The sum (a scalar) and the [N] log-probabilities, detached.

    Raises:
        ValueError: As :func:`linear_logprob`, and for coefficients that require a gradient.
    """
    check_head(hidden, weight)
    check_index("targets", targets, (hidden.shape[0],), weight.shape[0], hidden.device, validate)
    check_shape("coefficients", coefficients, (hidden.shape[0],), hidden.device)
    if coefficients.requires_grad:
        raise ValueError("coefficients require a gradient, and none flows to them: detach them")
    if coefficients.dtype != _accumulator(hidden.dtype):
        raise ValueError(f"coefficients must be {_accumulator(hidden.dtype)}, not {coefficients.dtype}")
    check_temperature(temperature)
    needs = torch.is_grad_enabled()
    total, logprobs = _WeightedLogprob.apply(hidden, weight, targets, coefficients, temperature, chunk_bytes, needs)
    return total, logprobs


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _operand(x: torch.Tensor) -> torch.Tensor:
    """CPU matrix products round 16-bit results to 16 bits, so 16-bit operands are widened there (exactly)."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) and not x.is_cuda else x


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Matrix product with a float32 (float64) result, whatever the operands' dtype."""
    if a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def _chunks(rows: int, vocabulary: int, dtype: torch.dtype, chunk_bytes: int) -> Iterator[slice]:
    step = max(1, chunk_bytes // (vocabulary * _accumulator(dtype).itemsize))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits minus their row's maximum: near p = 1 their log-sum-exp then keeps its last digits."""
    z = _mm(hidden, weight.t())
    if temperature != 1.0:
        z.div_(temperature)
    return z.sub_(z.amax(1, keepdim=True))


def _logsumexp(z: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp of each row, an eighth of the rows at a time: torch.logsumexp makes a temporary as large as z."""
    return torch.cat([torch.logsumexp(part, 1) for part in z.split(-(-z.shape[0] // 8))])


def _dlogits_(
    z: torch.Tensor, lse: torch.Tensor, ids: torch.Tensor, logp: torch.Tensor, u: torch.Tensor
) -> torch.Tensor:
    """Overwrite logits z [n, V] with dL/dz, given u = dL/dl [n, m] (see the module's docstring)."""
    total = u.sum(1, keepdim=True)
    dz = z.sub_(lse[:, None]).exp_().mul_(-total)
    return dz.scatter_(1, ids, -u * torch.expm1(logp) - logp.exp() * (total - u))


class _Gradients:
    """dL/dhidden and dL/dweight, gathered chunk by chunk; dW accumulates in float32 (float64)."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, need_hidden: bool, need_weight: bool) -> None:
        wide = _accumulator(hidden.dtype)
        self.hidden = torch.empty_like(hidden) if need_hidden else None
        self.weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None

    def add(self, rows: slice, dz: torch.Tensor, h: torch.Tensor, w: torch.Tensor, temperature: float) -> None:
        if temperature != 1.0:
            dz.div_(temperature)
        dz = dz.to(w.dtype)
        if self.hidden is not None:
            self.hidden[rows] = _mm(dz, w).to(self.hidden.dtype)
        if self.weight is not None:
            if dz.dtype == self.weight.dtype:
                self.weight.addmm_(dz.t(), h)
            else:
                self.weight += _mm(dz.t(), h)


class _SelectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, temperature: float, chunk_bytes: int
    ) -> torch.Tensor:
        n, m = ids.shape
        wide = _accumulator(hidden.dtype)
        logp = torch.empty(n, m, dtype=wide, device=hidden.device)
        lse = torch.empty(n, dtype=wide, device=hidden.device)
        w = _operand(weight)
        for rows in _chunks(n, weight.shape[0], hidden.dtype, chunk_bytes):
            z = _logits(_operand(hidden[rows]), w, temperature)
            lse[rows] = _logsumexp(z)
            logp[rows] = z.gather(1, ids[rows]) - lse[rows, None]
        ctx.save_for_backward(hidden, weight, ids, lse, logp)
        ctx.temperature, ctx.chunk_bytes = temperature, chunk_bytes
        return logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, ids, lse, logp = ctx.saved_tensors
        grads = _Gradients(hidden, weight, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        w = _operand(weight)
        for rows in _chunks(ids.shape[0], weight.shape[0], hidden.dtype, ctx.chunk_bytes):
            h = _operand(hidden[rows])
            dz = _dlogits_(_logits(h, w, ctx.temperature), lse[rows], ids[rows], logp[rows], u[rows])
            grads.add(rows, dz, h, w, ctx.temperature)
        dw = None if grads.weight is None else grads.weight.to(weight.dtype)
        return grads.hidden, dw, None, None, None


class _WeightedLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        coefficients: torch.Tensor,
        temperature: float,
        chunk_bytes: int,
        needs: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logp = torch.empty(targets.shape[0], dtype=_accumulator(hidden.dtype), device=hidden.device)
        grads = _Gradients(hidden, weight, needs and ctx.needs_input_grad[0], needs and ctx.needs_input_grad[1])
        w = _operand(weight)
        for rows in _chunks(targets.shape[0], weight.shape[0], hidden.dtype, chunk_bytes):
            h = _operand(hidden[rows])
            z = _logits(h, w, temperature)
            lse = _logsumexp(z)
            ids = targets[rows, None]
            chosen = z.gather(1, ids) - lse[:, None]
            logp[rows] = chosen[:, 0]
            if grads.hidden is not None or grads.weight is not None:
                grads.add(rows, _dlogits_(z, lse, ids, chosen, coefficients[rows, None]), h, w, temperature)
        dw = None if grads.weight is None else grads.weight.to(weight.dtype)
        ctx.save_for_backward(grads.hidden, dw)
        ctx.mark_non_differentiable(logp)
        return (coefficients * logp).sum(), logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dh, dw = ctx.saved_tensors
        scaled = [None if g is None else g * grad.to(g.dtype) for g in (dh, dw)]
        return (*scaled, None, None, None, None, None)
