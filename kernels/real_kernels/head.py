"""The two ways to the head's gradient, written once for both implementations of its primitives.

- In the forward pass (6 N D V FLOPs): the loss's coefficients are known, so each chunk of rows turns its saved logits
  into dL/dz in place and multiplies twice. dW is a sum over chunks, kept in float32. What rows of dL/dz have in common
  as a factor may be left to the products' smaller sides, dX and the hidden states.
- By recomputation (8 N D V): the forward pass keeps a log-sum-exp per row; the backward pass computes dL/dz again, a
  chunk of the vocabulary at a time for all rows at once, so each part of dW is written once.

With a `main_grad` (:mod:`real_kernels.main_grad`) either way adds dW to it, and makes no tensor of its size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from real_kernels.bf16_head import Bf16Head
from real_kernels.cpu import has_fast_bf16
from real_kernels.matmul import HALF, accum_dtype, addmm_, mm_exactly, mm_into, mm_scaled
from real_kernels.rollout_coefficients import RolloutCoefficients
from real_kernels.rows import HeadBackend, Rows, SavedLogits, SoftmaxStats
from real_kernels.torch_head import TorchHead, chunks

F = TypeVar("F", bound=Callable[..., Any])

# Most bytes of saved logits or of dL/dz alive at a time, unless told otherwise.
CHUNK_BYTES = 256 * 2**20
TRITON_CHUNK_BYTES = 2**30
# Weights of a head that is worth multiplying in bfloat16 on a CPU: smaller ones are widened in no time, and exactly.
WORTH_BF16 = 2**20


class GradMask(NamedTuple):
    """Which gradients are required: nothing is spent on the others."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        """Whether there is a gradient to compute at all."""
        return self.hidden or self.weight or self.bias


class Gradients(NamedTuple):
    """[n, D], [V, D] and [V], in the dtypes of what they are gradients of; None where not required."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


def make_backend(
    impl: str, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, chunk_bytes: int
) -> HeadBackend:
    """The implementation "torch" or "triton" for one lm_head."""
    head = head_class(impl)
    half_on_cpu = weight.dtype == torch.bfloat16 and not weight.is_cuda
    if head is TorchHead and half_on_cpu and weight.numel() >= WORTH_BF16 and has_fast_bf16()[0]:
        head = Bf16Head
    return head(weight, bias, softcap, chunk_bytes)


def head_class(impl: str) -> Callable[..., HeadBackend]:
    """The class of "torch" or "triton", whatever the CPU can do: to know that takes a measurement."""
    if impl == "torch":
        return TorchHead
    from real_kernels.triton_head import TritonHead

    return TritonHead


def on_its_device(function: F) -> F:
    """Runs it on the weight's device, where Triton launches, and without autocast, which would round logits."""

    @functools.wraps(function)
    def call(backend: HeadBackend, *arguments: Any) -> Any:
        device = backend.weight.device
        current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with current, torch.autocast(device.type, enabled=False):
            return function(backend, *arguments)

    return call  # type: ignore[return-value]


@on_its_device
def statistics(backend: HeadBackend, rows: Rows, entropy: bool = False) -> SoftmaxStats:
    """Log-probabilities alone."""
    return backend.statistics(rows, entropy)


class _Sum:
    """Gradients added up over chunks of rows."""

    def __init__(
        self, backend: HeadBackend, rows: int, parts: int, needs: GradMask, main_grad: torch.Tensor | None
    ) -> None:
        self.backend, self.needs, self.main_grad, self.started = backend, needs, main_grad, main_grad is not None
        weight = backend.weight
        self.hidden = weight.new_empty(rows, weight.shape[1]) if needs.hidden else None
        # One chunk alone is written straight into the weight's dtype.
        dtype = weight.dtype if parts == 1 else accum_dtype(weight.dtype)
        # Not even for a moment where the head is frozen: it is the largest tensor here.
        shape = weight.shape if needs.weight else 0
        self.weight = weight.new_empty(shape, dtype=dtype) if main_grad is None else main_grad
        self.bias = weight.new_zeros(weight.shape[0], dtype=accum_dtype(weight.dtype)) if needs.bias else None

    def add(self, rows: slice, buffer: torch.Tensor, hidden: torch.Tensor, factor: torch.Tensor | None) -> None:
        """Add a chunk, given its dL/dz over a factor per row [rows], None for 1."""
        whole = self.backend.columns(slice(0, self.backend.weight.shape[0]))
        dz = buffer.to(whole.dtype)
        if self.hidden is not None:
            if factor is None:
                mm_exactly(self.hidden[rows], dz, whole)
            else:
                mm_scaled(self.hidden[rows], dz, whole, factor)
        if self.needs.weight:
            if factor is not None:
                # Multiplied in float32 and rounded once, as dL/dz would have been.
                hidden = torch.mul(hidden, factor[:, None], out=torch.empty_like(hidden))
            if self.started:
                addmm_(self.weight, dz.t(), hidden.to(dz.dtype))
            else:
                mm_into(self.weight, dz.t(), hidden.to(dz.dtype))
                self.started = True
        if self.bias is not None and factor is None:
            self.bias += dz.sum(0, dtype=self.bias.dtype)
        elif self.bias is not None:
            assert factor is not None
            addmm_(self.bias[:, None], dz.t(), factor[:, None].to(dz.dtype))

    def result(self) -> Gradients:
        """The sums, in the dtypes of the weight and the bias."""
        weight = self.backend.weight
        dw = None
        if self.needs.weight and self.main_grad is None:
            dw = self.weight.to(weight.dtype) if self.started else torch.zeros_like(weight)
        return Gradients(self.hidden, dw, None if self.bias is None else self.bias.to(weight.dtype))


def _rows_at_once(backend: HeadBackend, n: int, needs: GradMask, main_grad: torch.Tensor | None) -> int:
    """Rows of a chunk: by the byte budget, or all where a float32 sum of dW would take more than chunks save."""
    weight = backend.weight
    step = backend.rows_per_chunk()
    if needs.weight and main_grad is None and weight.is_cuda and weight.dtype in HALF:
        more = (n - step) * weight.shape[0] * weight.element_size()
        return n if 0 < more <= 4 * weight.numel() else step
    return step


@on_its_device
def weighted_in_forward(
    backend: HeadBackend,
    rows: Rows,
    coefficients: torch.Tensor,
    needs: GradMask,
    main_grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Gradients]:
    """Log-probabilities [n], and the gradients of ``(coefficients * logp).sum()``."""
    if not needs.any:
        return backend.statistics(rows).logp[:, 0], Gradients(None, None, None)
    step = min(_rows_at_once(backend, rows.n, needs, main_grad), max(rows.n, 1))
    parts = list(chunks(rows.n, step))
    buffer, total = backend.buffer(step), _Sum(backend, rows.n, len(parts), needs, main_grad)
    logp = torch.empty(rows.n, dtype=accum_dtype(backend.weight.dtype), device=backend.weight.device)
    for part in parts:
        logits = buffer[: part.stop - part.start]
        saved = backend.keep(rows.part(part), logits)
        logp[part] = saved.stats.logp[:, 0]
        factor = backend.dlogits_(saved, coefficients[part, None])
        total.add(part, logits, saved.rows.hidden, factor)
    return logp, total.result()


@dataclass(frozen=True)
class RealForward:
    """What REAL's head knows after its forward pass.

    Attributes:
        score: Of the score rows.
        rollouts: What the score rows' rewards make of each rollout.
        coefficients: [N] of all text rows.
        index: Which text rows were computed, None for all; the three that follow are of these alone.
        text: Of the text rows, for a backward pass that recomputes.
        logp: Their log-probabilities.
        gradients: Of score rows and text rows, one after the other; None where not computed yet.
    """

    score: SoftmaxStats
    rollouts: RolloutCoefficients
    coefficients: torch.Tensor
    index: torch.Tensor | None
    text: SoftmaxStats | None
    logp: torch.Tensor
    gradients: Gradients | None


@on_its_device
def real_forward(
    backend: HeadBackend,
    score: Rows,
    text: Rows,
    coefficients_of: Callable[[torch.Tensor], RolloutCoefficients],
    rollout: torch.Tensor,
    row_valid: torch.Tensor | None,
    skip_zero_rows: bool,
    in_forward: bool,
    needs: GradMask,
    main_grad: torch.Tensor | None = None,
) -> RealForward:
    """Score rows, then what their rewards make of the text rows, then the text rows.

    Args:
        backend: The primitives.
        score: [M] score rows.
        text: [N] rows of sampled tokens.
        coefficients_of: From score log-probabilities to rewards, advantages and coefficients.
        rollout: [N] each text row's rollout.
        row_valid: [N] bool, rows of rollouts that count; None for all. The others are left out in any case.
        skip_zero_rows: Leave text rows with coefficient 0 out.
        in_forward: Compute the gradients now, score rows and text rows in the same chunks.
        needs: Which gradients.
        main_grad: [V, D] that dW is added to, where it is computed now.
    """
    m, budget = score.n, _rows_at_once(backend, score.n + text.n, needs, main_grad)
    # Score rows that fill the budget by themselves go first, and come again once their gradient is known.
    together = in_forward and needs.any and m < budget
    buffer, first = None, None
    if together:
        buffer = backend.buffer(min(budget, m + text.n))
        first = backend.keep(score, buffer[:m])
        stats = first.stats
    else:
        stats = backend.statistics(score)
    of_rollouts = coefficients_of(stats.logp)
    coefficients = of_rollouts.coefficient.index_select(0, rollout)
    kept_rows = coefficients != 0 if skip_zero_rows else row_valid
    # The one place that waits for a GPU: how many rows are left decides the shapes that follow.
    index = None if kept_rows is None else kept_rows.nonzero()[:, 0]
    if index is not None:
        text = text._replace(hidden=text.hidden.index_select(0, index), ids=text.ids.index_select(0, index))
    weights = coefficients if index is None else coefficients.index_select(0, index)
    if not (in_forward and needs.any):
        text_stats = backend.statistics(text)
        return RealForward(stats, of_rollouts, coefficients, index, text_stats, text_stats.logp[:, 0], None)

    if buffer is None:
        buffer = backend.buffer(min(budget, max(m, text.n)))
    pieces = _pieces(m, text.n, buffer.shape[0], together)
    total = _Sum(backend, m + text.n, len(pieces), needs, main_grad)
    logp = torch.empty(text.n, dtype=stats.logp.dtype, device=stats.logp.device)
    done = 0
    for scores, texts in pieces:
        a, b = scores.stop - scores.start, texts.stop - texts.start
        chunk: list[tuple[SavedLogits, torch.Tensor]] = []
        if a:
            part = first if first is not None else backend.keep(score.part(scores), buffer[:a])
            chunk.append((part, of_rollouts.dlogp[scores]))
        if b:
            part = backend.keep(text.part(texts), buffer[a : a + b])
            logp[texts] = part.stats.logp[:, 0]
            chunk.append((part, weights[texts, None]))
        factors = [backend.dlogits_(part, dlogp) for part, dlogp in chunk]
        hidden = [part.rows.hidden for part, _ in chunk]
        if chunk:
            rows = slice(done, done + a + b)
            together_rows = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
            total.add(rows, buffer[: a + b], together_rows, _joined(factors, hidden))
        done += a + b
    return RealForward(stats, of_rollouts, coefficients, index, None, logp, total.result())


def _joined(factors: Sequence[torch.Tensor | None], hidden: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The factors of some parts' rows one behind another, 1 where a part has none; None where no part has any."""
    known = next((factor for factor in factors if factor is not None), None)
    if known is None:
        return None
    return torch.cat([known.new_ones(len(h)) if f is None else f for f, h in zip(factors, hidden, strict=True)])


def _pieces(scores: int, texts: int, capacity: int, together: bool) -> list[tuple[slice, slice]]:
    """Chunks of (score rows, text rows) of at most `capacity` rows, score rows first."""
    nothing = slice(0, 0)
    if not together:
        return [(s, nothing) for s in chunks(scores, capacity)] + [(nothing, t) for t in chunks(texts, capacity)]
    beside = min(texts, capacity - scores)
    rest = [(nothing, slice(beside + t.start, beside + t.stop)) for t in chunks(texts - beside, capacity)]
    return [(slice(0, scores), slice(0, beside)), *rest]


@on_its_device
def recomputed_gradients(
    backend: HeadBackend,
    parts: Sequence[tuple[Rows, SoftmaxStats, torch.Tensor]],
    needs: GradMask,
    main_grad: torch.Tensor | None = None,
) -> Gradients:
    """Gradients of all rows, in the order of `parts`, each given with dlogp = dL/dlogp [n, m]."""
    weight = backend.weight
    v, d = weight.shape
    n = sum(rows.n for rows, _, _ in parts)
    own = needs.weight and main_grad is None
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if own else None
    db = weight.new_zeros(v) if needs.bias else None
    if not n:
        return Gradients(
            weight.new_zeros(0, d) if needs.hidden else None, None if dw is None else torch.zeros_like(dw), db
        )
    hidden = parts[0][0].hidden if len(parts) == 1 else torch.cat([rows.hidden for rows, _, _ in parts])
    dtype_of_products = backend.columns(slice(0, 0)).dtype
    hidden = hidden.to(dtype_of_products)
    step = backend.columns_per_chunk(n)
    dtype = weight.dtype if step >= v else accum_dtype(weight.dtype)
    dx = torch.empty(n, d, dtype=dtype, device=weight.device) if needs.hidden else None
    # Whole multiples of 64 apart, so that every row starts aligned.
    buffer = torch.empty(n, -(-step // 64) * 64, dtype=dtype_of_products, device=weight.device)
    for columns in chunks(v, step):
        dz, done = buffer[:, : columns.stop - columns.start], 0
        for rows, stats, dlogp in parts:
            backend.dlogits_columns(rows, stats, dlogp, columns.start, columns.stop, dz[done : done + rows.n])
            done += rows.n
        if dw is not None:
            mm_into(dw[columns], dz.t(), hidden)
        elif main_grad is not None and needs.weight:
            addmm_(main_grad[columns], dz.t(), hidden)
        if db is not None:
            db[columns] = dz.sum(0, dtype=accum_dtype(weight.dtype)).to(db.dtype)
        if dx is not None:
            if columns.start:
                addmm_(dx, dz, backend.columns(columns))
            else:
                mm_exactly(dx, dz, backend.columns(columns))
    return Gradients(None if dx is None else dx.to(weight.dtype), dw, db)
