"""The plain head for bfloat16 on a CPU that multiplies in bfloat16: no operand is widened, and no logit is rounded.

PyTorch's CPU products round their results to bfloat16. So logits are made of two: z = high + low, where `high` is the
product, and `low` the product once more minus `high`, rounded after the subtraction: off by 2^-18 of a logit instead of
2^-9. Both take as long as one product in float32, where bfloat16 is twice as fast. The gradient's two products need
bfloat16 alone, since what is rounded there is dL/dz and not an exponent.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from real_kernels.rows import Rows, SavedLogits
from real_kernels.torch_head import TorchHead, chunks, rows_in_cache, selected, selected_columns

# Score rows are multiplied in float32: so many of them, by so many columns of a weight that is widened in the cache.
EXACT_ROWS, EXACT_COLUMNS = 64, 1024


class Bf16Head(TorchHead):
    """See :class:`real_kernels.rows.HeadBackend`; for bfloat16 on the CPU.

    Saved logits are exp(z - row maximum) in bfloat16: numbers in 0..1, off by their own rounding alone.
    """

    def columns(self, columns: slice) -> torch.Tensor:
        return self.weight[columns]

    def buffer(self, n: int) -> torch.Tensor:
        return torch.empty(n, self.weight.shape[0], dtype=self.weight.dtype)

    def dlogits_(self, saved: SavedLogits, dlogp: torch.Tensor) -> torch.Tensor | None:
        rows, stats, p, slope = saved
        factor = -dlogp.sum(1, keepdim=True) * torch.exp(-stats.log_sum)[:, None]
        values, ids = selected_columns(stats.logp, dlogp), selected(rows)
        for part in chunks(rows.n, rows_in_cache(p.shape[1], 4)):
            dz = p[part].float().mul_(factor[part]).scatter_(1, ids[part], values[part])
            if slope is not None:
                dz.mul_(slope[part])
            p[part] = dz if rows.temperature == 1.0 else dz.div_(rows.temperature)
        return None

    def _blocks(self, rows: Rows, columns: slice, out: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        of_rows = self._exact if rows.shared else self._in_two
        for part, z in of_rows(rows.hidden, self.weight[columns], out):
            yield part, self._finish_(z, columns, rows.temperature)
            out[part] = z

    def _in_two(
        self, hidden: torch.Tensor, weight: torch.Tensor, high: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Products by the sum of two, of which `high` is made here."""
        torch.mm(hidden, weight.t(), out=high)
        low = torch.addmm(high, hidden, weight.t(), beta=-1)
        for part in chunks(high.shape[0], rows_in_cache(high.shape[1], 4)):
            yield part, high[part].float().add_(low[part])

    def _exact(
        self, hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Products in float32, of the few rows that rewards come from."""
        for part in chunks(out.shape[0], EXACT_ROWS):
            h = hidden[part].float()
            z = torch.cat([h @ weight[c].float().t() for c in chunks(out.shape[1], EXACT_COLUMNS)], 1)
            yield part, z
