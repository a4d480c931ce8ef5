"""Every kernel of the head against float64: ``python -m benchmarks.gpu.exact`` for the odd sizes alone, as a process.

A 16-bit result may be 1.15 times as far off as eager's full logits in the same dtype; float32 is held to 1e-5. Of a
single row either error is one draw of a few roundings, so a miss there is said, with both errors, and is no failure.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks.gpu.stages import Check, attempt
from real_kernels import (
    HeadOptions,
    linear_logprob,
    logprob_and_entropy,
    real_loss,
    score_logprobs,
    tiles,
    triton_head,
    weighted_logprob,
)
from real_kernels.tiles import Tile
from real_kernels.triton_persistent import persistent_kernel

# How much further off than eager; equal ones are equal on average alone.
SLACK, LUCK = 1.15, 1e-7
FLOAT32 = 1e-5
# REAL's loss is compared with itself in float64, without an eager one beside it: its rows' 16-bit gradients.
REAL = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# Of a single row: what no draw of roundings explains.
GROSS = 0.05
SCORES = (2, 16, 9, 5, 11)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One call, with its gradient.

    Attributes:
        kind: "forward" (the gradient computed with the loss), "recompute", "score", "entropy" or "real" (all of REAL).
        n: Rows.
        d: Hidden size.
        v: Vocabulary.
        dtype: Of hidden states and weight.
        bias: Whether the head has one.
        softcap: Of the logits.
        parts: Chunks that the rows or the vocabulary are computed in.
        off: Rows of hidden states do not start on 16 bytes, so that no descriptor can fetch them.
        persistent: By programs that go from tile to tile, which no default does.
    """

    kind: str
    n: int
    d: int
    v: int
    dtype: str = "bf16"
    bias: bool = False
    softcap: float | None = None
    parts: int = 1
    off: bool = False
    persistent: bool = False

    @property
    def name(self) -> str:
        """For people."""
        more = [word for word, there in (("bias", self.bias), ("soft-cap", self.softcap), ("off", self.off)) if there]
        more += ["persistent"] * self.persistent
        more += [f"{self.parts} parts"] * (self.parts > 1)
        return " ".join((f"{self.kind:9} N={self.n} D={self.d} V={self.v} {self.dtype}", *more))


@dataclass(frozen=True)
class Result:
    """How far one result of a case is off: relative, by Euclidean norm, against float64.

    Attributes:
        case: Which.
        what: "logp", "dX", "dW", ...
        error: Of ours.
        eager: Of full logits in the same dtype; None where `bound` is all there is to compare with.
        bound: What ours may be.
    """

    case: Case
    what: str
    error: float
    eager: float | None
    bound: float

    @property
    def held(self) -> bool:
        """Whether ours is within the bound; NaN is not."""
        return self.error <= self.bound

    @property
    def fine(self) -> bool:
        """Whether that is no failure."""
        return self.held or (self.case.n == 1 and self.error <= GROSS)

    @property
    def text(self) -> str:
        """What is said of one that is not held."""
        beside = f"eager's by {self.eager:.1e}" if self.eager is not None else f"allowed are {self.bound:.1e}"
        ending = " (one row, so no failure)" if self.fine else ""
        return f"{self.case.name}: {self.what} off by {self.error:.1e}, {beside}{ending}"


def cases(small: bool) -> Iterator[Case]:
    """Most important first: real sizes in bf16, a single row, odd sizes, the other dtypes, what else the head has."""
    odd = [(5, 24, 130), (33, 40, 203)]
    if not small:
        for kind in ("forward", "recompute", "score", "real", "entropy"):
            yield Case(kind, 300, 1024, 151_936)
        yield Case("forward", 300, 1024, 151_936, persistent=True)
        yield from (Case(kind, 1, 1024, 151_936) for kind in ("forward", "recompute", "score"))
        odd += [(70, 72, 139), (257, 1000, 50_257)]
    yield from (Case(kind, 1, 8, 17) for kind in ("forward", "recompute", "score"))
    kinds = ("forward", "recompute", "score", "entropy", "real")
    yield from (Case(kind, *shape) for shape in odd for kind in kinds)
    plain = Case("forward", *odd[1])
    # Of so many rows as have a base each.
    yield from (Case("forward", *shape, persistent=True) for shape in ((70, 72, 139), *odd[3:]))
    for case in (plain, replace(plain, kind="recompute"), replace(plain, kind="score")):
        for dtype in ("fp32", "fp16"):
            yield replace(case, dtype=dtype)
        yield replace(case, parts=3)
        yield replace(case, bias=True)
        yield replace(case, off=True)
        if case.kind != "forward":  # which has none with the Triton kernels
            yield replace(case, softcap=3.0, bias=True)
    yield replace(plain, kind="real", dtype="fp32")
    yield replace(plain, kind="entropy", dtype="fp32", bias=True)


def run(check: Check, end: float) -> int:
    """The stage: all cases on the card, small ones in Triton's interpreter or by PyTorch. Returns how many failed."""
    return compare(check, list(cases(check.small)), end)


def compare(check: Check, wanted: list[Case], end: float) -> int:
    """Say what is not held, and how the rest is. Returns how many results or cases failed."""
    impl = "triton" if triton_head.available(check.device) else "torch"
    wrong, done, worst = 0, 0, 0.0
    wanted = [case for case in wanted if not case.persistent or _persistent(check.device)]
    for case in wanted:
        if time.monotonic() > end:
            print(f"kernels: no time left for {len(wanted) - done} of {len(wanted)} cases, from {case.name} on")
            break
        found, whole = attempt(check, f"kernels: {case.name}", partial(results, case, check.device, impl))
        done += 1
        if not whole:
            wrong += 1
            continue
        for result in found:
            wrong += not result.fine
            worst = max(worst, result.error / result.bound)
            if not result.held:
                print(f"kernels: {result.text}")
        if case.n == 300:
            print(f"kernels: {case.name}: " + ", ".join(f"{r.what} {r.error:.1e} of {r.bound:.1e}" for r in found))
    how = "by Triton" if impl == "triton" else "by PyTorch (no kernel runs here)"
    print(f"kernels: {done} cases {how}, {wrong} wrong; at worst {worst:.2f} times what is allowed", flush=True)
    return wrong


def results(case: Case, device: torch.device, impl: Any) -> list[Result]:
    """Run a case and compare."""
    inputs = _Inputs(case, device)
    if case.kind == "real":
        mine, want = (_real(inputs, dtype, how) for dtype, how in ((inputs.dtype, impl), (torch.float64, "torch")))
        return [Result(case, what, _error(mine[what], want[what]), None, REAL[inputs.dtype] + LUCK) for what in want]
    want = _full_logits(inputs, torch.float64)
    with _only(_persistent(device)) if case.persistent else nullcontext():
        mine = _ours(inputs, impl)
    eager = _full_logits(inputs, inputs.dtype)
    out = []
    for what, right in want.items():
        beside = None if inputs.dtype == torch.float32 else _error(eager[what], right)
        bound = FLOAT32 if beside is None else SLACK * beside + LUCK
        out.append(Result(case, what, _error(mine[what], right), beside, bound))
    return out


def _persistent(device: torch.device) -> tuple[Tile, ...]:
    """The tiles of a device that ask for the persistent kernel; none where it does not run."""
    if not triton_head.available(device):
        return ()
    if device.type == "cpu":
        return tuple(tile._replace(persistent=True) for tile in tiles.INTERPRETED)
    return tuple(tile for tile in tiles.TILES[tiles.architecture(device)] if tile.persistent)


@contextmanager
def _only(some: tuple[Tile, ...]) -> Iterator[None]:
    """Take these tiles. Raises RuntimeError if the persistent kernel was not launched: another one was compared."""
    launches = []

    class Noted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launches.append(grid)
            return persistent_kernel[grid]

    with (
        mock.patch.multiple(tiles, TILES=dict.fromkeys(tiles.TILES, some), INTERPRETED=some),
        mock.patch.object(triton_head, "persistent_kernel", Noted()),
    ):
        yield
    if not launches:
        raise RuntimeError("the persistent kernel was not launched")


class _Inputs:
    """Logits of standard deviation 3, and an upstream gradient; the same whenever a case runs on a device."""

    def __init__(self, case: Case, device: torch.device) -> None:
        g = torch.Generator(device).manual_seed(case.n + case.v)
        made: dict[str, Any] = {"generator": g, "device": device}
        self.case, self.dtype = case, DTYPES[case.dtype]
        self.hidden = torch.randn(case.n, case.d + case.off, **made).to(self.dtype)[:, int(case.off) :]
        self.weight = (torch.randn(case.v, case.d, **made) * 3 / case.d**0.5).to(self.dtype)
        self.bias = torch.randn(case.v, **made).to(self.dtype) if case.bias else None
        m = len(SCORES) if case.kind == "score" else 1
        self.targets = torch.randint(case.v, (case.n,), **made)
        self.scores = torch.tensor(SCORES, device=device)
        self.upstream = torch.randn(case.n, m, **made)

    def leaves(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Hidden states, weight and bias to take gradients of; in their own dtype laid out as they are."""
        given = [self.hidden, self.weight] + ([] if self.bias is None else [self.bias])
        same = dtype == self.dtype
        return [(x.detach() if same else x.to(dtype)).requires_grad_() for x in given]


def _named(values: dict[str, torch.Tensor], loss: torch.Tensor, leaves: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    names = ("dX", "dW", "dbias")[: len(leaves)]
    grads = torch.autograd.grad(loss, leaves)
    return {name: x.detach() for name, x in values.items()} | dict(zip(names, grads, strict=True))


def _full_logits(inputs: _Inputs, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """By autograd through all logits, multiplied in `dtype`, then float32 (float64), as a model computes them."""
    leaves, case = inputs.leaves(dtype), inputs.case
    logits = F.linear(*leaves)
    logits = logits if dtype == torch.float64 else logits.float()
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    logp = logits.log_softmax(1)
    ids = inputs.scores.expand(case.n, -1) if case.kind == "score" else inputs.targets[:, None]
    chosen = logp.gather(1, ids)
    values = {"logp": chosen}
    if case.kind == "entropy":
        values["entropy"] = -(logp.exp() * logp).sum(1)
    return _named(values, (chosen * inputs.upstream).sum() * 0.5, leaves)


def _ours(inputs: _Inputs, impl: Any) -> dict[str, torch.Tensor]:
    """By the package's functions; the factor 0.5 is what scales gradients that were computed with the loss."""
    case, leaves = inputs.case, inputs.leaves(inputs.dtype)
    hidden, weight, *rest = leaves
    bias, u = rest[0] if rest else None, inputs.upstream
    size = 2 if inputs.dtype != torch.float32 else 4
    chunk = None if case.parts == 1 else max(1, case.n * case.v * size // case.parts)
    mode: Any = "forward" if case.kind == "forward" else "auto"
    head = HeadOptions(impl=impl, mode=mode, softcap=case.softcap, chunk_bytes=chunk, validate=False)
    if case.kind == "forward":
        total, logp = weighted_logprob(hidden, weight, inputs.targets, u[:, 0], bias=bias, head=head)
        return _named({"logp": logp[:, None]}, total * 0.5, leaves)
    if case.kind == "score":
        logp = score_logprobs(hidden, weight, inputs.scores, bias=bias, head=head)
        return _named({"logp": logp}, (logp * u).sum() * 0.5, leaves)
    values = {}
    if case.kind == "entropy":
        logp, values["entropy"] = logprob_and_entropy(hidden, weight, inputs.targets, bias=bias, head=head)
        logp = logp.detach()  # its gradient is that of the call below
        values["logp of entropy"] = logp[:, None]
    logp = linear_logprob(hidden, weight, inputs.targets, bias=bias, head=head)
    values["logp"] = logp[:, None]
    return _named(values, (logp * u[:, 0]).sum() * 0.5, leaves)


def _real(inputs: _Inputs, dtype: torch.dtype, impl: Any) -> dict[str, torch.Tensor]:
    """REAL's loss of n rows of 8 rollouts, two groups of four, and what it was made of."""
    hidden, weight = inputs.leaves(dtype)[:2]
    n, device = inputs.case.n, hidden.device
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rollouts = torch.arange(8, device=device)
    picked = torch.arange(8, device=device) * n // 8
    score_hidden = (inputs.hidden[picked] * 0.5).to(dtype).requires_grad_()
    values = torch.arange(1.0, len(SCORES) + 1, device=device, dtype=wide)
    labels = torch.tensor([1.0, 1.0, 1.0, 1.0, 3.5, 3.5, 3.5, 3.5], device=device, dtype=wide)
    out = real_loss(
        hidden, weight, inputs.targets, torch.arange(n, device=device) * 8 // n, score_hidden, inputs.scores, values,
        labels, rollouts // 4, head=HeadOptions(impl=impl, mode="forward", validate=False),
    )  # fmt: skip
    found = _named({"loss": out.loss}, out.loss * 0.5, [hidden, weight])
    return found


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    """NaN where a value is."""
    want = want.double()
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def main() -> int:
    """The odd sizes, in a process that a sanitizer may look into. Exit status 1 if one is wrong."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.exact", description="The head's kernels at odd sizes.")
    parser.add_argument("--cases", type=int, default=None, help="the first so many alone")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with TemporaryDirectory() as folder:
        check = Check(Path(folder), Path(folder), device, True, time.monotonic() + 600)
        return int(compare(check, list(cases(True))[: arguments.cases], check.end) > 0)


if __name__ == "__main__":
    sys.exit(main())
