"""The head in plain PyTorch: it runs on every device, and in float64 it is the oracle of the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from real_kernels.matmul import HALF, accum_dtype, mm_into, operand
from real_kernels.rows import Rows, SavedLogits, SoftmaxStats

# What a few rows of logits may take for passes over them to stay in a CPU's cache.
CACHE_BYTES = 2 * 2**20
# A chunk on the CPU where nothing is gained from a larger one.
STATISTICS_BYTES = 32 * 2**20


class TorchHead:
    """See :class:`real_kernels.rows.HeadBackend`. Logits are float32 (float64), a chunk of rows or columns at a time.

    Saved logits are exp(z - row maximum), so that no exponential is taken twice.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, chunk_bytes: int):
        self.weight, self.bias, self.softcap, self.chunk_bytes = weight, bias, softcap, chunk_bytes
        self.accum_dtype = accum_dtype(weight.dtype)
        self._operand: torch.Tensor | None = None
        # Of a logit; 16-bit operands of the products that follow are a copy.
        self._bytes = self.accum_dtype.itemsize + (
            weight.element_size() if weight.is_cuda and weight.dtype in HALF else 0
        )

    def columns(self, columns: slice) -> torch.Tensor:
        if columns.stop - columns.start < self.weight.shape[0]:
            return operand(self.weight[columns])
        if self._operand is None:
            self._operand = operand(self.weight)
        return self._operand

    def rows_per_chunk(self) -> int:
        return max(1, self.chunk_bytes // (self.weight.shape[0] * self._bytes))

    def columns_per_chunk(self, n: int) -> int:
        return max(1, min(self.weight.shape[0], self.chunk_bytes // (max(n, 1) * self._bytes)))

    def forward_by_default(self, n: int) -> bool:
        # What float16 keeps of a gradient before the loss is scaled may be 0.
        return self.weight.dtype != torch.float16

    def statistics(self, rows: Rows, entropy: bool = False) -> SoftmaxStats:
        step = self.rows_per_chunk()
        if not rows.hidden.is_cuda:
            # Nothing is summed over chunks here, and small ones come out of memory that is warm.
            step = min(step, max(128, STATISTICS_BYTES // (self.weight.shape[0] * self.accum_dtype.itemsize)))
        buffer = self.buffer(min(step, rows.n))
        parts = [
            self._keep(rows.part(chunk), buffer[: chunk.stop - chunk.start], entropy).stats
            for chunk in chunks(rows.n, step)
        ]
        if not parts:
            return self._keep(rows, buffer, entropy).stats
        row_max, log_sum = torch.cat([p.row_max for p in parts]), torch.cat([p.log_sum for p in parts])
        logp = torch.cat([p.logp for p in parts])
        entropies = [part.entropy for part in parts if part.entropy is not None]
        return SoftmaxStats(row_max, log_sum, logp, torch.cat(entropies) if entropy else None)

    def buffer(self, n: int) -> torch.Tensor:
        return torch.empty(n, self.weight.shape[0], dtype=self.accum_dtype, device=self.weight.device)

    def keep(self, rows: Rows, buffer: torch.Tensor) -> SavedLogits:
        return self._keep(rows, buffer, False)

    def dlogits_(self, saved: SavedLogits, dlogp: torch.Tensor) -> torch.Tensor | None:
        rows, stats, p, slope = saved
        factor = -dlogp.sum(1, keepdim=True) * torch.exp(-stats.log_sum)[:, None]
        values = selected_columns(stats.logp, dlogp)
        if rows.temperature != 1.0:
            factor, values = factor / rows.temperature, values / rows.temperature
        p.mul_(factor).scatter_(1, selected(rows), values)
        if slope is not None:
            p.mul_(slope)
        return None

    def dlogits_columns(
        self, rows: Rows, stats: SoftmaxStats, dlogp: torch.Tensor, first: int, last: int, out: torch.Tensor
    ) -> None:
        ids = selected(rows)
        for part, z in self._blocks(rows, slice(first, last), out):
            slope, logp, u = self._slope(z, rows.temperature), stats.logp[part], dlogp[part]
            z.sub_(stats.row_max[part, None]).sub_(stats.log_sum[part, None])
            dz = z.exp_().mul_(-u.sum(1, keepdim=True))
            values, of = selected_columns(logp, u), ids[part]
            here = (of >= first) & (of < last)
            columns = (of - first).clamp(0, last - first - 1)
            for k in range(of.shape[1]):  # one at a time: tokens that are not here share a column with others
                column, inside = columns[:, k : k + 1], here[:, k : k + 1]
                # Not by nonzero, which a GPU would have to be waited for.
                dz.scatter_(1, column, torch.where(inside, values[:, k : k + 1], dz.gather(1, column)))
            _chain_(dz, slope, rows.temperature)

    def _keep(self, rows: Rows, buffer: torch.Tensor, entropy: bool) -> SavedLogits:
        ids, n, m, dtype = selected(rows), rows.n, rows.selected, self.accum_dtype
        row_max, total, ez = (torch.empty(n, dtype=dtype, device=buffer.device) for _ in range(3))
        selected_logits = row_max.new_empty(n, m)
        slope = None if self.softcap is None else row_max.new_empty(n, buffer.shape[1])
        for part, block in self._blocks(rows, slice(0, self.weight.shape[0]), buffer):
            of_block = self._slope(block, rows.temperature)
            if slope is not None and of_block is not None:
                slope[part] = of_block
            torch.amax(block, 1, out=row_max[part])
            # Minus the maximum: near p = 1 the log-sum-exp then keeps its last digits.
            block.sub_(row_max[part, None])
            selected_logits[part] = block.gather(1, ids[part])
            if entropy:
                # p log p is 0, not NaN, where a token is masked out by a bias of -inf.
                shifted = block.clamp(min=torch.finfo(block.dtype).min)
                ez[part] = (block.exp_() * shifted).sum(1)
            else:
                block.exp_()
            torch.sum(block, 1, out=total[part])
        log_sum = total.log()
        stats = SoftmaxStats(
            row_max, log_sum, selected_logits - log_sum[:, None], log_sum - ez / total if entropy else None
        )
        return SavedLogits(rows, stats, buffer, slope)

    def _blocks(self, rows: Rows, columns: slice, out: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits of some columns, a few rows at a time; what a block holds when the next one is asked for is in `out`.

        On a CPU all passes over a block then run in its cache.
        """
        z = out if out.dtype == self.accum_dtype else torch.empty_like(out, dtype=self.accum_dtype)
        mm_into(z, operand(rows.hidden), self.columns(columns).t())
        for part in chunks(rows.n, rows.n if z.is_cuda else rows_in_cache(z.shape[1], z.itemsize)):
            yield part, self._finish_(z[part], columns, rows.temperature)
        if z is not out:
            out.copy_(z)

    def _finish_(self, z: torch.Tensor, columns: slice, temperature: float) -> torch.Tensor:
        """From products to logits as the softmax sees them, in place."""
        if self.bias is not None:
            z.add_(self.bias[columns].to(z.dtype))
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z if temperature == 1.0 else z.div_(temperature)

    def _slope(self, z: torch.Tensor, temperature: float) -> torch.Tensor | None:
        """Derivative of the soft-cap, given capped logits."""
        return None if self.softcap is None else 1 - (z * (temperature / self.softcap)) ** 2


def rows_in_cache(columns: int, itemsize: int) -> int:
    """How many rows a block has on a CPU."""
    return max(1, CACHE_BYTES // max(1, columns * itemsize))


def chunks(n: int, step: int) -> Iterator[slice]:
    """0..n in slices of at most `step`."""
    for start in range(0, n, max(step, 1)):
        yield slice(start, min(start + step, n))


def _chain_(dz: torch.Tensor, slope: torch.Tensor | None, temperature: float) -> None:
    """From logits as the softmax sees them back to those of the matrix product."""
    if slope is not None:
        dz.mul_(slope)
    if temperature != 1.0:
        dz.div_(temperature)


def selected(rows: Rows) -> torch.Tensor:
    """[n, m] ids."""
    return rows.ids[None, :].expand(rows.n, -1) if rows.shared else rows.ids[:, None]


def selected_columns(logp: torch.Tensor, dlogp: torch.Tensor) -> torch.Tensor:
    """dL/dz of the selected tokens [n, m], in the form that does not cancel near p = 1."""
    return -dlogp * torch.expm1(logp) - logp.exp() * (dlogp.sum(1, keepdim=True) - dlogp)
