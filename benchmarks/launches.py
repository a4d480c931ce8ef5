"""Every launch that the Triton head makes, as it makes it, compiled for a card that need not be there.

The public functions run on CPU tensors whose values are anything; a launch binds its arguments as Triton's launcher
does (which integers are 1 or divisible by 16, which pointers are aligned) and is compiled instead of run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from real_kernels import (
    HeadOptions,
    RealObjective,
    linear_logprob,
    logprob_and_entropy,
    real_loss,
    score_logprobs,
    tiles,
    triton_head,
    weighted_logprob,
)
from real_kernels.options import Reward
from real_kernels.tiles import Tile

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
GEMMS = ("logits", "persistent")
EPILOGUES = ("log-sum-exp", "kept logits", "dlogits")
# Divisible as real sizes are; as small as their kernels are the same.
_N, _D, _V, _SCORES, _ROLLOUTS = 130, 128, 1024, (1, 2, 3, 4, 5), 16
_DEVICES = itertools.count()


@dataclass(frozen=True)
class Launch:
    """One compiled launch.

    Attributes:
        kernel: Its name, without "_kernel".
        variant: What sets it apart from the kernel's others.
        dtype: Of hidden states and weight.
        tile: Of the GEMM; None for the small kernels.
        compiled: What Triton made of it.
    """

    kernel: str
    variant: str
    dtype: str
    tile: Tile | None
    compiled: Any


class _Card:
    """What Triton asks of a driver before it launches; each a device of its own, as Triton keeps kernels by device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.number = target, next(_DEVICES)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextmanager
def compiled_for(arch: str, tile: Tile | None = None) -> Iterator[list[tuple[JITFunction[Any], dict[str, Any], Any]]]:
    """Make launches compile for an architecture instead of run; with `tile`, as the default of rows.

    For a process that launches nothing for real: Triton takes the architecture for its card from then on.

    Yields:
        A list that gets the kernel's function, its keyword arguments and the compiled kernel of every launch.
    """
    launches: list[tuple[JITFunction[Any], dict[str, Any], Any]] = []
    launch = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(self, *args, grid=grid, warmup=True, **options)
        launches.append((self, options, compiled))
        return compiled

    def architecture(device: torch.device) -> str:
        return arch

    # Nothing to go back to where there is no card.
    driver.set_active(_Card(TARGETS[arch]))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(tiles, "architecture", architecture),
        mock.patch.object(triton_head, "architecture", architecture),
        mock.patch.object(triton_head, "available", lambda device: True),
        mock.patch.dict(tiles.TILES, {} if tile is None else {arch: (tile,)}),
    ):
        yield launches


def launches(arch: str, alternatives: bool = True) -> Iterator[Launch]:
    """Every kernel that the head launches on an architecture, each once.

    Args:
        arch: One of :data:`TARGETS`.
        alternatives: Whether the tiles behind the default one are compiled too.
    """
    seen: set[str] = set()
    for number, tile in enumerate(tiles.TILES[arch]):
        if number and not alternatives:
            return
        for operands, dtype, work in _everything() if number == 0 else [_PLAIN]:
            with compiled_for(arch, tile) as found:
                work()
            for function, options, compiled in found:
                if compiled.hash not in seen:
                    seen.add(compiled.hash)
                    yield _named(function, options, compiled, operands, dtype, tile)


def _named(
    function: JITFunction[Any], options: dict[str, Any], compiled: Any, operands: str, dtype: str, of_rows: Tile
) -> Launch:
    kernel, tile = function.fn.__name__.removesuffix("_kernel"), None
    what = [text for name, text in _FLAGS.items() if options.get(name)]
    if kernel == "persistent":
        what = [EPILOGUES[1], _FLAGS["BASE"]]
    elif kernel == "logits":
        what.insert(0, EPILOGUES[options["STORE"]])
    if kernel in GEMMS:
        sizes = [options[name] for name in ("BM", "BN", "BK", "num_stages", "num_warps", "GROUP")]
        tile = of_rows if of_rows[: len(sizes)] == tuple(sizes) else Tile(*sizes)
    if operands and operands not in what:
        what.append(operands)
    return Launch(kernel, ", ".join(what) or "rows", dtype, tile, compiled)


_FLAGS = {
    "BASE": "row base",
    "ENTROPY": "entropy",
    "SHARED": "score tokens",
    "BIAS": "bias",
    "CAP": "soft-cap",
    "REFERENCE": "authors' reward",
}
# What sets its operands apart, their dtype, and the calls that launch.
Work = tuple[str, str, Callable[[], None]]


def _everything() -> Iterator[Work]:
    """All modes and kinds of operands."""
    yield _PLAIN
    yield "", "bf16", lambda: _rows(torch.bfloat16, entropy=True)
    yield "score tokens", "bf16", lambda: _score(torch.bfloat16)
    yield "", "bf16", lambda: _real(torch.bfloat16, "paper")
    yield "", "bf16", lambda: _real(torch.bfloat16, "authors")
    yield "101 scores", "bf16", lambda: _real(torch.bfloat16, "authors", 101)
    yield "many rows", "bf16", lambda: _rows(torch.bfloat16, entropy=True, n=2048)
    yield "", "fp16", lambda: _rows(torch.float16, kept=True)
    yield "", "bf16", lambda: _rows(torch.bfloat16, kept=True, bias=True)
    yield "", "bf16", lambda: _rows(torch.bfloat16, bias=True, softcap=30.0)
    yield "", "bf16", lambda: _score(torch.bfloat16, bias=True, softcap=30.0)
    yield "pointers", "bf16", lambda: _rows(torch.bfloat16, kept=True, off=True)
    yield "pointers, odd D", "bf16", lambda: _rows(torch.bfloat16, kept=True, d=_D - 28)
    yield "odd V", "bf16", lambda: _rows(torch.bfloat16, kept=True, v=_V - 21)
    yield "", "fp32", lambda: _rows(torch.float32, kept=True)
    yield "", "fp32", lambda: _score(torch.float32)


# What a training step does with rows, by either mode.
_PLAIN: Work = "", "bf16", lambda: _rows(torch.bfloat16, kept=True)


def _tensors(
    dtype: torch.dtype, d: int = _D, v: int = _V, off: bool = False, bias: bool = False, n: int = _N
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Hidden states (with `off`, of rows that do not start on 16 bytes), weight, bias."""
    hidden = torch.randn(n, d + off).to(dtype)[:, off:]
    weight = torch.randn(v, d).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randn(v).to(dtype) if bias else None


def _rows(
    dtype: torch.dtype, kept: bool = False, entropy: bool = False, softcap: float | None = None, **how: Any
) -> None:
    """Log-probabilities of a target each, with their gradient; `kept`: also with the gradient in the forward pass."""
    hidden, weight, bias = _tensors(dtype, **how)
    targets = torch.randint(weight.shape[0], (len(hidden),))
    head = HeadOptions(impl="triton", temperature=0.7, softcap=softcap)
    linear_logprob(hidden, weight, targets, bias=bias, head=head).sum().backward()
    if entropy:
        logprob_and_entropy(hidden, weight, targets, bias=bias, head=head)
    if kept:
        head = HeadOptions(impl="triton", mode="forward")
        weighted_logprob(hidden, weight, targets, torch.ones(len(hidden)), bias=bias, head=head)[0].backward()


def _score(dtype: torch.dtype, softcap: float | None = None, **how: Any) -> None:
    """Log-probabilities of the score tokens, with their gradient."""
    hidden, weight, bias = _tensors(dtype, **how)
    head = HeadOptions(impl="triton", softcap=softcap)
    score_logprobs(hidden, weight, torch.tensor(_SCORES), bias=bias, head=head).sum().backward()


def _real(dtype: torch.dtype, reward: Reward, scores: int = len(_SCORES)) -> None:
    """The whole loss, with the gradient in the forward pass."""
    hidden, weight, _ = _tensors(dtype)
    score_hidden = torch.randn(_ROLLOUTS, _D).to(dtype).requires_grad_()
    of_rollouts = torch.arange(_ROLLOUTS)
    out = real_loss(
        hidden, weight, torch.randint(_V, (_N,)), torch.arange(_N) % _ROLLOUTS, score_hidden, torch.arange(scores),
        torch.arange(scores).float(), torch.ones(_ROLLOUTS), of_rollouts // 4, skip_zero_rows=False,
        objective=RealObjective(reward=reward), head=HeadOptions(impl="triton", mode="forward"),
    )  # fmt: skip
    (out.loss * 0.5).backward()
