"""The head by Triton kernels: the log-sum-exp inside the GEMM's epilogue, logits never in memory as such."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from real_kernels.matmul import HALF, operand
from real_kernels.options import RealObjective
from real_kernels.rollout_coefficients import RolloutCoefficients
from real_kernels.rows import Rows, SavedLogits, SoftmaxStats
from real_kernels.tiles import BRANCHES, Kind, Tile, architecture, choose
from real_kernels.triton_base import base_kernel, common_base_kernel
from real_kernels.triton_gemm import logits_kernel
from real_kernels.triton_persistent import persistent_kernel
from real_kernels.triton_reward import reward_kernel
from real_kernels.triton_rows import combine_kernel, dlogits_kernel, scale_kernel

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Below this many rows a chunk's gradient of the weight is bound by reading and writing the sum, [V, D] in float32:
# 8 V D bytes against the 2 n D V operations that recomputing adds; at 3 TB/s and 700 TFLOP/s they meet at n = 930.
WORTHWHILE_ROWS = 1024
# dL/dz of a chunk of the vocabulary: more makes nothing faster, as each chunk's part of dW is written once anyhow.
COLUMN_BYTES = 256 * 2**20
# So many rows have saved logits relative to a base per row (triton_base.py), fewer have them relative to tiles' maxima.
# Of fewer, the pass that is saved takes no longer than the launches that save it (64 rows of V 151,936: 39 MB to read
# and write, 13 us), and one rounding more in dW does not average out.
BASE_ROWS = 64
# Saved rows and dL/dz start on a multiple of 128 bytes, as matrix instructions and cuBLAS want them.
_ALIGN = 64


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before the first import)."""
    return not isinstance(logits_kernel, triton.JITFunction)


def available(device: torch.device) -> bool:
    """Whether the kernels can run on tensors of this device."""
    return device.type == "cuda" or (device.type == "cpu" and interpreted())


class TritonHead:
    """See :class:`real_kernels.rows.HeadBackend`; for float16, bfloat16 and float32.

    Saved logits are exponentials in the weight's dtype, so that a 16-bit one is off by its rounding alone (2^-9 in
    bfloat16), where a 16-bit logit of 20 would be off by e^(1/16). They are relative to a base per row
    (:mod:`real_kernels.triton_base`); those of few rows, of score rows and of float16, which has not the range, to
    tiles' maxima.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, chunk_bytes: int):
        # The kernels step through D by one.
        self.weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.softcap, self.chunk_bytes = softcap, chunk_bytes

    def columns(self, columns: slice) -> torch.Tensor:
        return operand(self.weight[columns])

    def rows_per_chunk(self) -> int:
        step = max(1, self.chunk_bytes // (_aligned(self.weight.shape[0]) * self.weight.element_size()))
        return step // 128 * 128 if step > 128 else step

    def columns_per_chunk(self, n: int) -> int:
        chunk_bytes = min(self.chunk_bytes, COLUMN_BYTES)
        columns = max(1, min(self.weight.shape[0], chunk_bytes // (max(n, 1) * self.weight.element_size())))
        return columns // 256 * 256 if 256 < columns < self.weight.shape[0] else columns

    def forward_by_default(self, n: int) -> bool:
        # The soft-cap's slope needs the logit itself, which exp(z - max) has lost where it underflows.
        # And what float16 keeps of dL/dz before the loss is scaled may be 0.
        if self.softcap is not None or self.weight.dtype == torch.float16:
            return False
        return self.rows_per_chunk() >= min(n, WORTHWHILE_ROWS)

    def statistics(self, rows: Rows, entropy: bool = False) -> SoftmaxStats:
        return self._forward(rows, None, entropy).stats

    def buffer(self, n: int) -> torch.Tensor:
        v = self.weight.shape[0]
        return torch.empty(n, _aligned(v), dtype=self.weight.dtype, device=self.weight.device)[:, :v]

    def keep(self, rows: Rows, buffer: torch.Tensor) -> SavedLogits:
        if self.softcap is not None:
            raise ValueError('the Triton head has a soft-cap with mode="recompute" alone')
        return self._forward(rows, buffer, False)

    def dlogits_(self, saved: SavedLogits, dlogp: torch.Tensor) -> torch.Tensor | None:
        rows, stats, buffer, (tile_max, columns, row_base) = saved
        n, v = buffer.shape
        block, tiles = 16, triton.cdiv(v, columns)
        if row_base is not None:
            factor = torch.empty_like(row_base)
            # So many that a block whose rows all need the pass is shared, and one that does not costs next to nothing.
            common_base_kernel[(triton.cdiv(n, block), min(8, tiles))](
                buffer,
                rows.ids,
                tile_max,
                row_base,
                stats.row_max,
                stats.log_sum,
                dlogp,
                stats.logp,
                factor,
                n,
                tiles,
                _aligned(v),
                buffer.stride(0),
                1.0 / rows.temperature,
                BLOCK_ROWS=block,
                BN=columns,
                num_warps=8,
            )
            return factor
        if n:
            dlogits_kernel[(tiles, triton.cdiv(n, block))](
                buffer,
                rows.ids,
                tile_max,
                stats.row_max,
                stats.log_sum,
                dlogp,
                stats.logp,
                n,
                _aligned(v),
                rows.selected,
                buffer.stride(0),
                1.0 / rows.temperature,
                SHARED=rows.shared,
                BLOCK_ROWS=block,
                BN=columns,
                num_warps=8,
            )
        return None

    def dlogits_columns(
        self, rows: Rows, stats: SoftmaxStats, dlogp: torch.Tensor, first: int, last: int, out: torch.Tensor
    ) -> None:
        if not rows.n:
            return
        hidden = _rows_of(rows.hidden)

        def launch(tile: Tile) -> None:
            self._launch(tile, hidden, rows, first, last, 2, out=out, stats=stats, dlogp=dlogp)

        launch(choose(hidden.device, hidden.dtype, self._kind(rows), self._key(rows, last - first), launch))

    def _forward(self, rows: Rows, buffer: torch.Tensor | None, entropy: bool) -> SavedLogits:
        n, v, m, device = rows.n, self.weight.shape[0], rows.selected, rows.hidden.device
        row_max, log_sum = (torch.empty(n, dtype=torch.float32, device=device) for _ in range(2))
        logp = torch.empty(n, m, dtype=torch.float32, device=device)
        stats = SoftmaxStats(row_max, log_sum, logp, torch.empty_like(row_max) if entropy else None)
        if not n:
            return SavedLogits(rows, stats, stats.logp if buffer is None else buffer, (None, 1, None))
        hidden = _rows_of(rows.hidden)
        based = buffer is not None and n >= BASE_ROWS and not rows.shared and self.weight.dtype != torch.float16
        row_base = self._base(hidden, rows) if based else None
        selected = torch.empty(n, m, dtype=torch.float32, device=device)
        store, kind = 0 if buffer is None else 1, self._kind(rows, entropy)

        def launch(tile: Tile) -> torch.Tensor:
            tiles = triton.cdiv(v, tile.columns)
            parts = torch.empty(3 if entropy else 2, tiles, n, dtype=torch.float32, device=device)
            stays = tile.persistent and kind == "rows" and _descriptors(hidden)
            if stays and buffer is not None and row_base is not None:
                self._launch_persistent(tile, hidden, rows, buffer, parts, selected, row_base)
            else:
                self._launch(tile, hidden, rows, 0, v, store, out=buffer, parts=parts, selected=selected, base=row_base)
            return parts

        tile = choose(device, hidden.dtype, kind, (store + based, *self._key(rows, v)), launch)
        parts = launch(tile)
        # Few rows: more programs, each with more tiles at a time.
        block, at_once = (32, 32) if n > 1024 else (4, 256)
        combine_kernel[(triton.cdiv(n, block),)](
            parts[0],
            parts[1],
            parts[-1],
            selected,
            stats.row_max,
            stats.log_sum,
            stats.logp,
            stats.row_max if stats.entropy is None else stats.entropy,
            n,
            parts.shape[1],
            m,
            1.0 / rows.temperature,
            ENTROPY=entropy,
            BLOCK_TILES=at_once,
            BLOCK_ROWS=block,
        )
        return SavedLogits(rows, stats, selected if buffer is None else buffer, (parts[0], tile.columns, row_base))

    def _base(self, hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
        """[n] the targets' logits, in bits."""
        (n, d), block = hidden.shape, 4
        base = torch.empty(n, dtype=torch.float32, device=hidden.device)
        base_kernel[(triton.cdiv(n, block),)](
            hidden,
            self.weight,
            hidden if self.bias is None else self.bias,
            rows.ids,
            base,
            n,
            d,
            self.weight.shape[0],
            hidden.stride(0),
            self.weight.stride(0),
            1.0 / rows.temperature,
            BIAS=self.bias is not None,
            BLOCK_ROWS=block,
            BLOCK_D=512,
        )
        return base

    def _launch(
        self,
        tile: Tile,
        hidden: torch.Tensor,
        rows: Rows,
        first: int,
        last: int,
        store: int,
        *,
        out: torch.Tensor | None = None,
        parts: torch.Tensor | None = None,
        selected: torch.Tensor | None = None,
        base: torch.Tensor | None = None,
        stats: SoftmaxStats | None = None,
        dlogp: torch.Tensor | None = None,
    ) -> None:
        """One launch of the GEMM. What a kind of epilogue does not use is given some tensor that is there."""
        n, d = hidden.shape
        weight, any_tensor = self.weight, hidden
        descriptors = _descriptors(hidden) and _descriptors(weight)
        h: Any = TensorDescriptor.from_tensor(hidden, [tile.rows, tile.depth]) if descriptors else hidden
        w: Any = TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]) if descriptors else weight
        parts = any_tensor[None] if parts is None else parts
        logits_kernel[(triton.cdiv(n, tile.rows) * triton.cdiv(last - first, tile.columns),)](
            h,
            w,
            any_tensor if self.bias is None else self.bias,
            rows.ids,
            parts[0],
            parts[min(1, len(parts) - 1)],
            parts[-1],
            any_tensor if selected is None else selected,
            any_tensor if base is None else base,
            any_tensor if stats is None else stats.row_max,
            any_tensor if stats is None else stats.log_sum,
            any_tensor if dlogp is None else dlogp,
            any_tensor if stats is None else stats.logp,
            any_tensor if out is None else out,
            n,
            d,
            first,
            last,
            rows.selected,
            hidden.stride(0),
            weight.stride(0),
            0 if out is None else out.stride(0),
            0 if out is None else min(_aligned(last - first), out.stride(0)),
            1.0 / rows.temperature,
            1.0 if self.softcap is None else self.softcap,
            BM=tile.rows,
            BN=tile.columns,
            BK=tile.depth,
            GROUP=tile.group,
            DESCRIPTORS=descriptors,
            EVEN_D=d % tile.depth == 0,
            BIAS=self.bias is not None,
            CAP=self.softcap is not None,
            SHARED=rows.shared,
            ENTROPY=len(parts) == 3,
            STORE=store,
            BASE=base is not None,
            BRANCHES=architecture(hidden.device) in BRANCHES,
            # float32 operands are multiplied as float32, not as TF32.
            PRECISION="ieee",
            WIDEN=interpreted() and hidden.dtype == torch.bfloat16,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def _launch_persistent(
        self,
        tile: Tile,
        hidden: torch.Tensor,
        rows: Rows,
        out: torch.Tensor,
        parts: torch.Tensor,
        selected: torch.Tensor,
        base: torch.Tensor,
    ) -> None:
        """What :meth:`_launch` does for plain bfloat16 rows that are kept relative to a base."""
        n, v = out.shape
        tiles = triton.cdiv(n, tile.rows) * triton.cdiv(v, tile.columns)
        persistent_kernel[(min(_programs(hidden.device), tiles),)](
            TensorDescriptor.from_tensor(hidden, [tile.rows, tile.depth]),
            TensorDescriptor.from_tensor(self.weight, [tile.columns, tile.depth]),
            rows.ids,
            parts[0],
            parts[1],
            selected,
            base,
            TensorDescriptor.from_tensor(out, [tile.rows, tile.columns // 2]),
            n,
            hidden.shape[1],
            v,
            1.0 / rows.temperature,
            BM=tile.rows,
            BN=tile.columns,
            BK=tile.depth,
            GROUP=tile.group,
            WIDEN=interpreted() and hidden.dtype == torch.bfloat16,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def _kind(self, rows: Rows, entropy: bool = False) -> Kind:
        if rows.shared:
            return "scores"
        plain = self.softcap is None and _aligned_rows(rows.hidden) and _aligned_rows(self.weight)
        biased = self.bias is not None
        if not plain or (biased and architecture(rows.hidden.device) == "sm_100"):
            return "narrow"
        return "more" if entropy or biased else "rows"

    def _key(self, rows: Rows, columns: int) -> tuple[int, ...]:
        return (triton.next_power_of_2(rows.n), rows.hidden.shape[1], triton.next_power_of_2(columns))


def rollout_coefficients(
    logp: torch.Tensor,
    engine_score_logprobs: torch.Tensor | None,
    values: torch.Tensor,
    labels: torch.Tensor,
    group: torch.Tensor,
    rollout_valid: torch.Tensor,
    counts: torch.Tensor,
    objective: RealObjective,
) -> RolloutCoefficients:
    """As :func:`real_kernels.rollout_coefficients.rollout_coefficients`, in one launch. float32."""
    m, k = logp.shape
    per_rollout = torch.empty(5, m, dtype=torch.float32, device=logp.device)
    dlogp = torch.empty(m, k, dtype=torch.float32, device=logp.device)
    if m:
        scores = triton.next_power_of_2(k)
        block = max(1, min(32, 256 // scores))  # rollouts times scores are what a program holds in registers
        reward_kernel[(triton.cdiv(m, block),)](
            logp.contiguous(),
            (logp if engine_score_logprobs is None else engine_score_logprobs).contiguous(),
            values.contiguous(),
            labels.contiguous(),
            group.contiguous(),
            rollout_valid.contiguous().view(torch.uint8),
            counts,
            *per_rollout,
            dlogp,
            m,
            k,
            float(objective.lam),
            float(objective.beta),
            float(objective.advantage_clip),
            REFERENCE=objective.reward == "authors",
            RENORMALIZE=objective.renormalize,
            LEAVE_ONE_OUT=objective.baseline == "leave_one_out",
            NORMALIZE=objective.normalize_std,
            TOKEN_MEAN=objective.loss_norm == "token_mean",
            BLOCK=block,
            KP=triton.next_power_of_2(k),
        )
    y_hat, reward, advantages, coefficient, refinement = per_rollout
    return RolloutCoefficients(y_hat, reward, advantages, coefficient, refinement, dlogp)


def scaled(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x times a number on the device, multiplied in float32."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            scale_kernel[(triton.cdiv(x.numel(), 4096),)](x, out, factor, x.numel(), BLOCK=4096, num_warps=8)
    return out


def _programs(device: torch.device) -> int:
    """Of a kernel whose programs stay: one for each multiprocessor. In the interpreter three, for more tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _aligned(columns: int) -> int:
    return -(-columns // _ALIGN) * _ALIGN


def _rows_of(hidden: torch.Tensor) -> torch.Tensor:
    return hidden if hidden.stride(1) == 1 else hidden.contiguous()


def _descriptors(x: torch.Tensor) -> bool:
    """Whether the bulk copy engine (TMA) can fetch tiles of x; Triton's interpreter plays it where it can."""
    return architecture(x.device) in ("sm_90", "sm_100", "interpreter") and x.dtype in HALF and _aligned_rows(x)


def _aligned_rows(x: torch.Tensor) -> bool:
    """Whether every row starts on 16 bytes, none on another's."""
    starts = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return bool(x.numel()) and starts and x.stride(0) >= x.shape[1] and x.stride(1) == 1
