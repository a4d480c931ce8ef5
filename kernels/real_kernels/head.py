"""The two ways to the head's gradient, written once for both implementations of its primitives.

- In the forward pass (6 N D V FLOPs): the loss's coefficients are known, so each chunk of rows turns its kept logits
  into dL/dz in place and multiplies twice. dW is a sum over chunks, kept in float32.
- By recomputation (8 N D V): the forward pass keeps a log-sum-exp per row; the backward pass computes dL/dz again, a
  chunk of the vocabulary at a time for all rows at once, so each part of dW is written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from real_kernels.matmul import HALF, accumulator, addmm_, mm_exactly, mm_into, operand
from real_kernels.rollout_terms import RolloutTerms
from real_kernels.rows import Head, Kept, Rows, Stats
from real_kernels.torch_head import TorchHead, chunks

F = TypeVar("F", bound=Callable[..., Any])
Impl = Literal["auto", "triton", "torch"]
Mode = Literal["auto", "forward", "recompute"]

# Most bytes of kept logits or of dL/dz alive at a time, unless told otherwise.
CHUNK_BYTES = 256 * 2**20
TRITON_CHUNK_BYTES = 2**30


class Needs(NamedTuple):
    """Which gradients are wanted: nothing is spent on the others."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def any(self) -> bool:
        """Whether there is a gradient to compute at all."""
        return self.hidden or self.weight or self.bias


class Gradients(NamedTuple):
    """[n, D], [V, D] and [V], in the dtypes of what they are gradients of; None where not wanted."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


def make_head(
    impl: str, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, chunk_bytes: int
) -> Head:
    """The implementation "torch" or "triton" for one lm_head."""
    if impl == "torch":
        return TorchHead(weight, bias, softcap, chunk_bytes)
    from real_kernels.triton_head import TritonHead

    return TritonHead(weight, bias, softcap, chunk_bytes)


def on_its_device(function: F) -> F:
    """Runs it on the weight's device, where Triton launches, and without autocast, which would round logits."""

    @functools.wraps(function)
    def call(head: Head, *arguments: Any) -> Any:
        device = head.weight.device
        current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with current, torch.autocast(device.type, enabled=False):
            return function(head, *arguments)

    return call  # type: ignore[return-value]


@on_its_device
def statistics(head: Head, rows: Rows, entropy: bool = False) -> Stats:
    """Log-probabilities alone."""
    return head.statistics(rows, entropy)


class _Sum:
    """Gradients added up over chunks of rows."""

    def __init__(self, head: Head, rows: int, parts: int, needs: Needs) -> None:
        self.head, self.needs, self.started = head, needs, False
        weight = head.weight
        self.hidden = weight.new_empty(rows, weight.shape[1]) if needs.hidden else None
        # One chunk alone is written straight into the weight's dtype.
        wide = weight.dtype if parts == 1 else accumulator(weight.dtype)
        # Not even for a moment where the head is frozen: it is the largest tensor here.
        self.weight = weight.new_empty(weight.shape if needs.weight else 0, dtype=wide)
        self.bias = weight.new_zeros(weight.shape[0], dtype=accumulator(weight.dtype)) if needs.bias else None

    def add(self, rows: slice, buffer: torch.Tensor, hidden: torch.Tensor) -> None:
        """Add a chunk, given its dL/dz."""
        whole = self.head.columns(slice(0, self.head.weight.shape[0]))
        dz = operand(buffer.to(whole.dtype))
        if self.hidden is not None:
            mm_exactly(self.hidden[rows], dz, whole)
        if self.needs.weight:
            if self.started:
                addmm_(self.weight, dz.t(), operand(hidden))
            else:
                mm_into(self.weight, dz.t(), operand(hidden))
                self.started = True
        if self.bias is not None:
            self.bias += dz.sum(0, dtype=self.bias.dtype)

    def result(self) -> Gradients:
        """The sums, in the dtypes of the weight and the bias."""
        weight = self.head.weight
        dw = None
        if self.needs.weight:
            dw = self.weight.to(weight.dtype) if self.started else torch.zeros_like(weight)
        return Gradients(self.hidden, dw, None if self.bias is None else self.bias.to(weight.dtype))


def _rows_at_once(head: Head, n: int, needs: Needs) -> int:
    """Rows of a chunk: by the byte budget, or all where a float32 sum of dW would take more than chunks save."""
    weight = head.weight
    step = head.rows_per_chunk()
    if needs.weight and weight.is_cuda and weight.dtype in HALF:
        more = (n - step) * weight.shape[0] * weight.element_size()
        return n if 0 < more <= 4 * weight.numel() else step
    return step


@on_its_device
def weighted_in_forward(
    head: Head, rows: Rows, coefficients: torch.Tensor, needs: Needs
) -> tuple[torch.Tensor, Gradients]:
    """Log-probabilities [n], and the gradients of ``(coefficients * logp).sum()``."""
    if not needs.any:
        return head.statistics(rows).logp[:, 0], Gradients(None, None, None)
    step = min(_rows_at_once(head, rows.n, needs), max(rows.n, 1))
    parts = list(chunks(rows.n, step))
    buffer, total = head.buffer(step), _Sum(head, rows.n, len(parts), needs)
    logp = torch.empty(rows.n, dtype=accumulator(head.weight.dtype), device=head.weight.device)
    for part in parts:
        room = buffer[: part.stop - part.start]
        kept = head.keep(rows.part(part), room)
        logp[part] = kept.stats.logp[:, 0]
        head.dlogits_(kept, coefficients[part, None])
        total.add(part, room, kept.rows.hidden)
    return logp, total.result()


@dataclass(frozen=True)
class RealForward:
    """What REAL's head knows after its forward pass.

    Attributes:
        score: Of the score rows.
        terms: Of the rollouts.
        coefficients: [N] of all text rows.
        index: Which text rows were computed, None for all; the three that follow are of these alone.
        text: Of the text rows, for a backward pass that recomputes.
        logp: Their log-probabilities.
        gradients: Of score rows and text rows, one after the other; None where not computed yet.
    """

    score: Stats
    terms: RolloutTerms
    coefficients: torch.Tensor
    index: torch.Tensor | None
    text: Stats | None
    logp: torch.Tensor
    gradients: Gradients | None


@on_its_device
def real_forward(
    head: Head,
    score: Rows,
    text: Rows,
    terms_of: Callable[[torch.Tensor], RolloutTerms],
    rollout: torch.Tensor,
    live: torch.Tensor | None,
    drop_zero_rows: bool,
    in_forward: bool,
    needs: Needs,
) -> RealForward:
    """Score rows, then what their rewards make of the text rows, then the text rows.

    Args:
        head: The primitives.
        score: [M] score rows.
        text: [N] rows of sampled tokens.
        terms_of: From score log-probabilities to rewards, advantages and coefficients.
        rollout: [N] each text row's rollout.
        live: [N] bool, rows of rollouts that count; None for all. The others are left out in any case.
        drop_zero_rows: Leave text rows with coefficient 0 out.
        in_forward: Compute the gradients now, score rows and text rows in the same chunks.
        needs: Which gradients.
    """
    m, budget = score.n, _rows_at_once(head, score.n + text.n, needs)
    # Score rows that fill the budget by themselves go first, and come again once their gradient is known.
    together = in_forward and needs.any and m < budget
    buffer, first = None, None
    if together:
        buffer = head.buffer(min(budget, m + text.n))
        first = head.keep(score, buffer[:m])
        stats = first.stats
    else:
        stats = head.statistics(score)
    terms = terms_of(stats.logp)
    coefficients = terms.coefficient.index_select(0, rollout)
    wanted = coefficients != 0 if drop_zero_rows else live
    # The one place that waits for a GPU: how many rows are left decides the shapes that follow.
    index = None if wanted is None else wanted.nonzero()[:, 0]
    if index is not None:
        text = text._replace(hidden=text.hidden.index_select(0, index), ids=text.ids.index_select(0, index))
    weights = coefficients if index is None else coefficients.index_select(0, index)
    if not (in_forward and needs.any):
        text_stats = head.statistics(text)
        return RealForward(stats, terms, coefficients, index, text_stats, text_stats.logp[:, 0], None)

    if buffer is None:
        buffer = head.buffer(min(budget, max(m, text.n)))
    pieces = _pieces(m, text.n, buffer.shape[0], together)
    total = _Sum(head, m + text.n, len(pieces), needs)
    logp = torch.empty(text.n, dtype=stats.logp.dtype, device=stats.logp.device)
    done = 0
    for scores, texts in pieces:
        a, b = scores.stop - scores.start, texts.stop - texts.start
        kept: list[tuple[Kept, torch.Tensor]] = []
        if a:
            part = first if first is not None else head.keep(score.part(scores), buffer[:a])
            kept.append((part, terms.u[scores]))
        if b:
            part = head.keep(text.part(texts), buffer[a : a + b])
            logp[texts] = part.stats.logp[:, 0]
            kept.append((part, weights[texts, None]))
        for part, u in kept:
            head.dlogits_(part, u)
        hidden = [part.rows.hidden for part, _ in kept]
        if kept:
            rows = slice(done, done + a + b)
            total.add(rows, buffer[: a + b], hidden[0] if len(hidden) == 1 else torch.cat(hidden))
        done += a + b
    return RealForward(stats, terms, coefficients, index, None, logp, total.result())


def _pieces(scores: int, texts: int, room: int, together: bool) -> list[tuple[slice, slice]]:
    """Chunks of (score rows, text rows) that fit into `room` rows, score rows first."""
    nothing = slice(0, 0)
    if not together:
        return [(s, nothing) for s in chunks(scores, room)] + [(nothing, t) for t in chunks(texts, room)]
    head = min(texts, room - scores)
    rest = [(nothing, slice(head + t.start, head + t.stop)) for t in chunks(texts - head, room)]
    return [(slice(0, scores), slice(0, head)), *rest]


@on_its_device
def recomputed_gradients(head: Head, parts: Sequence[tuple[Rows, Stats, torch.Tensor]], needs: Needs) -> Gradients:
    """Gradients of all rows, in the order of `parts`, each given with u = dL/dlogp [n, m]."""
    weight = head.weight
    v, d = weight.shape
    n = sum(rows.n for rows, _, _ in parts)
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs.weight else None
    db = weight.new_zeros(v) if needs.bias else None
    if not n:
        return Gradients(
            weight.new_zeros(0, d) if needs.hidden else None, None if dw is None else torch.zeros_like(dw), db
        )
    hidden = parts[0][0].hidden if len(parts) == 1 else torch.cat([rows.hidden for rows, _, _ in parts])
    hidden = operand(hidden)
    step = head.columns_per_chunk(n)
    wide = weight.dtype if step >= v else accumulator(weight.dtype)
    dx = torch.empty(n, d, dtype=wide, device=weight.device) if needs.hidden else None
    # Whole multiples of 64 apart, so that every row starts aligned.
    room = torch.empty(n, -(-step // 64) * 64, dtype=head.columns(slice(0, 0)).dtype, device=weight.device)
    for columns in chunks(v, step):
        dz, done = room[:, : columns.stop - columns.start], 0
        for rows, stats, u in parts:
            head.dlogits_columns(rows, stats, u, columns.start, columns.stop, dz[done : done + rows.n])
            done += rows.n
        if dw is not None:
            mm_into(dw[columns], dz.t(), hidden)
        if db is not None:
            db[columns] = dz.sum(0, dtype=accumulator(weight.dtype)).to(db.dtype)
        if dx is not None:
            if columns.start:
                addmm_(dx, dz, head.columns(columns))
            else:
                mm_exactly(dx, dz, head.columns(columns))
    return Gradients(None if dx is None else dx.to(weight.dtype), dw, db)
