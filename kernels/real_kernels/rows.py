"""What the two implementations of the head (plain PyTorch and Triton) have in common."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch


class Rows(NamedTuple):
    """Hidden states and the tokens whose log-probabilities are wanted.

    Attributes:
        hidden: [n, D].
        ids: int64, [n] targets, one per row; or [m] tokens that all rows share.
        shared: Which of the two.
        temperature: Divides the logits.
    """

    hidden: torch.Tensor
    ids: torch.Tensor
    shared: bool
    temperature: float = 1.0

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.hidden.shape[0]

    @property
    def selected(self) -> int:
        """m, tokens per row."""
        return self.ids.shape[0] if self.shared else 1

    def part(self, rows: slice) -> Rows:
        """Some of the rows."""
        return self._replace(hidden=self.hidden[rows], ids=self.ids if self.shared else self.ids[rows])


class SoftmaxStats(NamedTuple):
    """What the backward pass needs of the forward pass; float32 (float64 for float64 hidden states).

    Attributes:
        row_max: [n] largest logit. This and `log_sum` are read by the implementation that made them alone, and the
            Triton one has both in bits.
        log_sum: [n] log-sum-exp minus `row_max`: kept apart, as their sum would lose digits.
        logp: [n, m] log-probabilities of the selected tokens.
        entropy: [n] of the whole distribution, in nats; None unless asked for.
    """

    row_max: torch.Tensor
    log_sum: torch.Tensor
    logp: torch.Tensor
    entropy: torch.Tensor | None = None

    def part(self, rows: slice) -> SoftmaxStats:
        """Some of the rows."""
        return SoftmaxStats(self.row_max[rows], self.log_sum[rows], self.logp[rows])


class SavedLogits(NamedTuple):
    """A chunk's logits in the form that an implementation keeps them in."""

    rows: Rows
    stats: SoftmaxStats
    buffer: torch.Tensor
    extra: Any = None


class HeadBackend(Protocol):
    """One implementation of the heavy primitives, for one lm_head."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def columns(self, columns: slice) -> torch.Tensor:
        """The weight of some vocabulary entries, [columns, D], as an operand of a matrix product."""

    def rows_per_chunk(self) -> int:
        """Rows whose saved logits fit into the byte budget; at least one."""

    def columns_per_chunk(self, n: int) -> int:
        """Vocabulary entries whose dL/dz for n rows fits into the byte budget; at least one."""

    def forward_by_default(self, n: int) -> bool:
        """Whether computing the gradient in the forward pass is the better choice for n rows."""

    def statistics(self, rows: Rows, entropy: bool = False) -> SoftmaxStats:
        """Log-probabilities, without saving logits."""

    def buffer(self, n: int) -> torch.Tensor:
        """An uninitialised tensor for n rows of logits."""

    def keep(self, rows: Rows, buffer: torch.Tensor) -> SavedLogits:
        """Log-probabilities, and the logits in `buffer`, [n, V]."""

    def dlogits_(self, saved: SavedLogits, dlogp: torch.Tensor) -> torch.Tensor | None:
        """Overwrite saved logits with dL/dz [n, V], given dlogp = dL/dlogp [n, m]; or with dL/dz over a factor per row.

        Returns:
            [n] those factors, float32 (float64); None where they are all 1.
        """

    def dlogits_columns(
        self, rows: Rows, stats: SoftmaxStats, dlogp: torch.Tensor, first: int, last: int, out: torch.Tensor
    ) -> None:
        """dL/dz of the vocabulary's columns first..last-1, computed again, into `out` [n, last - first]."""
