"""Tile sizes of the GEMM kernel: a small fixed set per architecture, the first of which is the default.

Set ``REAL_KERNELS_AUTOTUNE=1`` to time the set once per shape and take the fastest; without it nothing is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch


class Tile(NamedTuple):
    """One configuration of the GEMM kernel.

    Attributes:
        rows: Rows of hidden states per program.
        columns: Vocabulary entries per program.
        depth: Hidden dimensions per step.
        stages: Depth of the software pipeline.
        warps: Warps per program.
        group: Row tiles that neighbouring programs share, for reuse in L2.
        programs: That fit on a multiprocessor at once, so that one's epilogue runs beside the other's products.
            "python -m benchmarks.kernels" holds the machine code to it.
        persistent: Whether plain rows' logits are kept by :mod:`real_kernels.triton_persistent`, whose programs go from
            tile to tile; other launches take a program per tile.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int
    group: int = 16
    programs: int = 1
    persistent: bool = False


# 16-bit operands. Kept to what fits without spilling: 99 KiB of shared memory for the default of sm_80 (it serves sm_86
# and sm_89 too), 227 KiB on sm_90 and sm_100, 64 KiB on gfx942. "python -m benchmarks.kernels" compiles them all.
TILES: dict[str, tuple[Tile, ...]] = {
    "sm_80": (Tile(128, 128, 32, 4, 8), Tile(256, 128, 32, 3, 8), Tile(128, 128, 64, 3, 8)),
    "sm_90": (
        Tile(128, 256, 64, 4, 8),
        Tile(128, 128, 64, 3, 8, programs=2),
        Tile(256, 128, 64, 4, 8),
        Tile(128, 256, 64, 3, 8, persistent=True),
    ),
    "sm_100": (Tile(128, 256, 64, 4, 8), Tile(128, 128, 64, 3, 8, programs=2), Tile(256, 128, 64, 4, 8)),
    "gfx942": (Tile(128, 128, 32, 2, 4), Tile(256, 128, 32, 2, 8), Tile(64, 128, 64, 2, 4)),
}
# float32 operands, multiplied exactly (no TF32): twice the bytes, and no matrix instructions.
FLOAT32: dict[str, tuple[Tile, ...]] = {
    "sm_80": (Tile(64, 128, 32, 3, 8),),
    "sm_90": (Tile(64, 128, 32, 3, 8),),
    "sm_100": (Tile(64, 128, 32, 3, 8),),
    "gfx942": (Tile(64, 64, 32, 2, 4),),
}
# Rows that share their tokens are score rows, one per rollout: few, so that the weight's bytes are what takes time.
SCORES: dict[str, Tile] = {
    "sm_80": Tile(64, 128, 32, 4, 4),
    "sm_90": Tile(64, 128, 64, 4, 4),
    "sm_100": Tile(64, 128, 64, 4, 8),
    "gfx942": Tile(64, 128, 32, 2, 4),
}
# A soft-cap's slope, a bias on sm_100, and rows that no descriptor can fetch (off 16 bytes) take more registers.
NARROW: dict[str, Tile] = {
    "sm_80": Tile(128, 128, 32, 4, 8),
    "sm_90": Tile(128, 128, 64, 3, 8),
    "sm_100": Tile(128, 128, 64, 3, 8),
    "gfx942": Tile(128, 128, 32, 2, 8),
}
# Where the epilogue branches around what few tiles need. Compiled for the others, a branch holds the tile in registers
# twice (sm_80: 127 become 165, and one program fits where two did; sm_100 spills).
BRANCHES = ("sm_90", "interpreter")
Kind = Literal["rows", "more", "scores", "narrow"]
# The interpreter runs tiles one after another in NumPy: small ones, so that tests meet several of them.
INTERPRETED = (Tile(32, 64, 32, 1, 4, 2),)

_chosen: dict[tuple[object, ...], Tile] = {}


def architecture(device: torch.device) -> str:
    """Which set of tiles a device takes; "interpreter" for CPU tensors."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    # sm_120 (consumer Blackwell) has neither wgmma nor sm_100's tensor memory, and 99 KiB of shared memory.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def candidates(arch: str, dtype: torch.dtype, kind: Kind = "rows") -> tuple[Tile, ...]:
    """The tiles of an architecture, default first."""
    if arch == "interpreter":
        return INTERPRETED
    if dtype == torch.float32:
        return FLOAT32[arch]
    if kind == "scores":
        return (SCORES[arch],)
    if kind == "narrow":
        return (NARROW[arch],)
    # The entropy's sum and a bias take registers that the others have not. (128 x 256 is no tile on sm_80: even a base
    # per row would spill.)
    return TILES[arch][:1] if kind == "more" else TILES[arch]


def choose(
    device: torch.device, dtype: torch.dtype, kind: Kind, key: tuple[int, ...], run: Callable[[Tile], object]
) -> Tile:
    """The tile to use: the default, or the fastest of the set if ``REAL_KERNELS_AUTOTUNE=1``.

    Args:
        device: Where the kernel runs.
        dtype: Of the operands.
        kind: Rows with a target each; the same with their entropy or a bias; score rows; or what takes most registers.
        key: Shape, such as (rows rounded up to a power of two, D, V); timed once each.
        run: Launches the kernel with one tile.
    """
    arch = architecture(device)
    tiles = candidates(arch, dtype, kind)
    if len(tiles) == 1 or os.environ.get("REAL_KERNELS_AUTOTUNE", "0") != "1":
        return tiles[0]
    full = (device.index, dtype, *key)
    if full not in _chosen:
        from triton.testing import do_bench

        _chosen[full] = min(tiles, key=lambda tile: float(do_bench(lambda: run(tile), warmup=20, rep=60)))
    return _chosen[full]
