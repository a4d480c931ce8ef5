"""Seconds of each phase of the head, apart, on the device's own clock, beside torch.mm of the same shapes.

Phases are timed from outside: the backend's primitives and the matrix products around them are wrapped, and a public
function is called as a trainer calls it. So what a change of the head adds or leaves out shows by its own name.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.stages import Check, attempt
from benchmarks.head import Shape, matmul_rate, timed_inputs
from benchmarks.record import append
from real_kernels import HeadOptions, head, linear_logprob, tiles, triton_head, weighted_logprob
from real_kernels.rows import HeadBackend
from real_kernels.tiles import Tile, architecture

SHAPES = tuple(Shape(8192, d, 151_936) for d in (4096, 1024, 2048))
SMALL_SHAPES = (Shape(40, 32, 256, torch.float32),)
MODES = ("forward", "recompute", "evaluation")
# What else is tried on a card: group is how many row tiles share the weight's in L2, depth 128 halves the steps.
# "python -m benchmarks.kernels" compiles what tiles.py ships; of these, none spills for sm_90 (Triton 3.7).
CANDIDATES = {
    "sm_90": (
        Tile(128, 256, 64, 3, 8),
        Tile(128, 256, 64, 4, 8, group=8),
        Tile(128, 256, 64, 4, 8, group=64),
        Tile(128, 128, 128, 3, 8),
    )
}
# Names of the primitives; one that is not here goes by its own.
PHASES = {
    "statistics": "forward, nothing stored",
    "keep": "forward, logits stored",
    "dlogits_": "dlogits",
    "dlogits_columns": "dlogits, recomputed",
    "scaled": "scaling",
}
PRODUCTS = ("mm_exactly", "mm_into", "addmm_")
# Of a backend, what computes nothing.
_PLANS = ("columns", "rows_per_chunk", "columns_per_chunk", "forward_by_default", "buffer")


class Stopwatch:
    """Seconds by phase: by events on CUDA, which do not hold the device up, and by the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.on_card = device.type == "cuda"
        self.marks: list[tuple[str, Any, Any]] = []
        self.inside = False

    def wrap(self, function: Callable[..., Any], phase: Callable[..., str]) -> Callable[..., Any]:
        """The same function, timed; one that another one calls belongs to that one."""

        def timed(*arguments: Any, **options: Any) -> Any:
            if self.inside:
                return function(*arguments, **options)
            self.inside = True
            try:
                with self(phase(*arguments)):
                    return function(*arguments, **options)
            finally:
                self.inside = False

        return timed

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time what is inside."""
        started = self._now()
        yield
        self.marks.append((phase, started, self._now()))

    def seconds(self) -> dict[str, float]:
        """Waits for the device; sums since the last call."""
        if self.on_card:
            torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for phase, started, ended in self.marks:
            found[phase] += started.elapsed_time(ended) / 1e3 if self.on_card else ended - started
        self.marks.clear()
        return dict(found)

    def _now(self) -> Any:
        if not self.on_card:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def timed_phases(watch: Stopwatch, impl: str) -> Iterator[None]:
    """The head's primitives, and what multiplies around them, timed by `watch`."""
    backend: Any = head.head_class(impl)
    primitives = [name for name in vars(HeadBackend) if callable(getattr(HeadBackend, name))]
    primitives += [name for name in vars(backend) if callable(getattr(backend, name))]
    with ExitStack() as stack:
        for name in dict.fromkeys(primitives):
            if not name.startswith("_") and name not in _PLANS:
                timed = watch.wrap(getattr(backend, name), lambda *_, name=name: PHASES.get(name, name))
                stack.enter_context(mock.patch.object(backend, name, timed))
        for name in PRODUCTS:
            if hasattr(head, name):
                timed = watch.wrap(getattr(head, name), _product)
                stack.enter_context(mock.patch.object(head, name, timed))
        timed = watch.wrap(triton_head.scaled, lambda *_: PHASES["scaled"])
        stack.enter_context(mock.patch.object(triton_head, "scaled", timed))
        yield


def _product(_: torch.Tensor, a: torch.Tensor, *__: torch.Tensor) -> str:
    """dW's product has the transposed dL/dz on its left."""
    return "dW" if a.stride(0) == 1 and a.shape[1] > 1 else "dX"


def measure(shape: Shape, device: torch.device, mode: str, impl: str, rounds: int) -> dict[str, float]:
    """Medians of each phase's seconds, and of all of them ("whole")."""
    hidden, weight, targets = timed_inputs(shape, device)
    coefficients = torch.full((shape.n,), -1.0 / shape.n, device=device)
    options: Any = {"impl": impl, "validate": False}

    def once() -> None:
        hidden.grad = weight.grad = None
        with watch("whole"):
            if mode == "forward":
                loss, _ = weighted_logprob(
                    hidden, weight, targets, coefficients, head=HeadOptions(mode="forward", **options)
                )
                (loss * 0.5).backward()
            elif mode == "recompute":
                (-linear_logprob(hidden, weight, targets, head=HeadOptions(**options)).mean() * 0.5).backward()
            else:
                with torch.no_grad():
                    linear_logprob(hidden, weight, targets, head=HeadOptions(**options))

    watch = Stopwatch(device)
    with timed_phases(watch, impl):
        for _ in range(3 if device.type == "cuda" else 1):
            once()
        watch.seconds()
        found = []
        for _ in range(rounds):
            once()
            found.append(watch.seconds())
    hidden.grad = weight.grad = None
    return {phase: statistics.median(each[phase] for each in found) for phase in found[0]}


def products(shape: Shape, device: torch.device, rounds: int) -> dict[str, float]:
    """Medians of torch.mm's seconds for the three products of a forward and backward pass."""
    hidden, weight, _ = (x.detach() for x in timed_inputs(shape, device))
    logits = torch.empty(shape.n, shape.v, dtype=shape.dtype, device=device)
    dx, dw = torch.empty_like(hidden), torch.empty_like(weight)
    work = {
        "logits": lambda: torch.mm(hidden, weight.t(), out=logits),
        "dX": lambda: torch.mm(logits, weight, out=dx),
        "dW": lambda: torch.mm(logits.t(), hidden, out=dw),
    }
    watch = Stopwatch(device)
    found = []
    for _ in range(rounds + 3):
        for name, multiply in work.items():
            with watch(name):
                multiply()
        found.append(watch.seconds())
    return {name: statistics.median(each[name] for each in found[3:]) for name in work}


def ways(device: torch.device) -> Mapping[str, Tile | None]:
    """Name to tile: the shipped ones, the default first, then the candidates; None for whatever is taken."""
    arch = architecture(device)
    if arch not in tiles.TILES:
        return {"default": None}
    first, *others = tiles.TILES[arch]
    shipped = {"default": first} | {_name(tile): tile for tile in others}
    return shipped | {f"{_name(tile)}, candidate": tile for tile in CANDIDATES.get(arch, ())}


def _name(tile: Tile) -> str:
    group = "" if tile.group == Tile._field_defaults["group"] else f", group {tile.group}"
    stays = ", persistent" if tile.persistent else ""
    return f"{tile.rows}x{tile.columns}x{tile.depth}, {tile.stages} stages{group}{stays}"


def run(check: Check, end: float) -> int:
    """The stage: every mode by the default tile at every shape, then the other tiles. Returns how many failed."""
    device, wrong = check.device, 0
    impl = "triton" if triton_head.available(device) else "torch"
    rounds = 10 if device.type == "cuda" else 2
    shapes = SMALL_SHAPES if check.small else SHAPES
    found = ways(device)
    default = next(iter(found))
    for shape in shapes:
        work = partial(_say_products, shape, check, rounds)
        wrong += not attempt(check, f"torch.mm, {shape.model}", work)[1]
    todo = [(shape, default, mode) for shape in shapes for mode in MODES]
    # A tile changes what the kernel does in a forward pass, and dL/dz where that is computed again.
    for shape, (way, tile) in product(shapes[:2], list(found.items())[1:]):
        # Where nothing is kept, a persistent tile is one with a program per tile.
        todo += [(shape, way, mode) for mode in (MODES[:1] if tile and tile.persistent else MODES[:2])]
    for shape, way, mode in todo:
        if time.monotonic() > end:
            print(f"phases: no time left from {shape.model}, {way}, {mode} on")
            break
        work = partial(_say, shape, way, found[way], mode, check, impl, rounds)
        wrong += not attempt(check, f"phases: {shape.model}, {way}, {mode}", work)[1]
    return wrong


def _say_products(shape: Shape, check: Check, rounds: int) -> None:
    seconds = products(shape, check.device, rounds)
    _write(shape, "torch.mm", "products", seconds, sum(seconds.values()), shape.flops(True), check)


def _say(shape: Shape, way: str, tile: Tile | None, mode: str, check: Check, impl: str, rounds: int) -> None:
    arch = architecture(check.device)
    with mock.patch.dict(tiles.TILES, {} if tile is None else {arch: (tile,)}):
        seconds = measure(shape, check.device, mode, impl, rounds)
    whole = seconds.pop("whole")
    seconds["rest"] = whole - sum(seconds.values())
    _write(shape, way, mode, seconds, whole, shape.flops(mode != "evaluation"), check)


def _write(
    shape: Shape, way: str, what: str, seconds: dict[str, float], whole: float, flops: float, check: Check
) -> None:
    """Seconds by phase and together, into the results and for people."""
    share = flops / whole / matmul_rate(check.device, shape.dtype)
    values: dict[str, tuple[float | None, str]] = {f"seconds/{name}": (s, "s") for name, s in seconds.items()}
    values |= {"seconds": (whole, "s"), "of_matmul_rate": (share, "1")}
    append("phases", shape.model, way, f"N={shape.n} {what}", values)
    listed = ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in seconds.items())
    told = f"{listed}; together {1e3 * whole:.2f} ms, {share:.1%} of the matmul rate"
    print(f"phases: {shape.model} N={shape.n} {what}, {way}: {told}", flush=True)
