"""The fused LM head beside what others have: one loss, the mean cross-entropy of N rows, forward and backward.

Every contender is a factory: given hidden states [N, D], weight [V, D] and targets [N] it returns ``loss()``. Before it
is timed, its loss and gradients are compared with full logits in float64 (`errors`), and both are recorded beside its
seconds: who rounds more is not timed as equal.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks import peers, roofline
from benchmarks.machine import PeakMemory, synchronize
from benchmarks.peers import PEERS, Factory, Loss
from benchmarks.record import append, append_absence
from real_kernels import HeadOptions, linear_logprob, weighted_logprob

OURS = (
    "ours forward",
    "ours recompute",
    "ours forward, small budget",
    "ours forward, tuned",
    "ours recompute, tuned",
    "ours forward, tiles' maxima",
    "ours forward, gradient scaled",
)
NAMES = (*OURS, *PEERS)
FULL_LOGITS = ("eager", "torch.compile")
# Bytes per logit of those at their peak: bf16 logits, float32 copy, log-softmax, and the gradients of all three.
LOGIT_BYTES = 16
# A loss or gradient further off than this many times eager's, in the same dtype, is said to be; eager may be lucky.
TOLERATED, LUCK = 2.0, 1e-6
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Shape:
    """N rows of D, V words."""

    n: int
    d: int
    v: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def model(self) -> str:
        """The CSV's column of that name."""
        return f"V={self.v} D={self.d} {_DTYPES[self.dtype]}"

    def flops(self, backward: bool) -> float:
        """The least that full logits, and their gradients, take."""
        return (6.0 if backward else 2.0) * self.n * self.d * self.v


CPU_SHAPES = (
    Shape(1024, 576, 49_152, torch.float32),
    Shape(256, 1024, 151_936, torch.float32),
    Shape(512, 576, 49_152, torch.bfloat16),
)
# Those that others publish come first: a run that is cut off has them. Each weight is larger than a GPU's cache.
CUDA_SHAPES = tuple(
    Shape(n, d, v)
    for d, v, n in (
        (4096, 128_256, 8192),
        (1024, 151_936, 8192),
        (4096, 151_936, 8192),
        (1024, 49_152, 8192),
        (4096, 128_256, 2048),
        (1024, 151_936, 2048),
        (1024, 128_256, 8192),
        (4096, 49_152, 8192),
        (4096, 151_936, 2048),
        (1024, 49_152, 2048),
        (1024, 128_256, 2048),
        (4096, 49_152, 2048),
    )
)
SMALL_SHAPES = (Shape(64, 64, 1024, torch.float32), Shape(64, 64, 1024, torch.bfloat16))


def shapes(device: torch.device, small: bool = False) -> tuple[Shape, ...]:
    """What is timed on a device."""
    if small:
        return SMALL_SHAPES
    return CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES


def default_rounds(device: torch.device) -> int:
    """How often each contender is timed."""
    return 10 if device.type == "cuda" else 2


def contenders(device: torch.device, impl: Any = "auto") -> dict[str, Factory]:
    """Name to factory of all that run on this device; `impl` is that of real_kernels."""
    made: dict[str, Factory] = {
        "ours forward": partial(_ours, impl, 1),
        "ours recompute": partial(_ours_recompute, impl),
        "ours forward, small budget": partial(_ours, impl, 8),
        "ours forward, tuned": partial(_ours, impl, 1),
        "ours recompute, tuned": partial(_ours_recompute, impl),
        # As the head was before: what the base per row and the known upstream gradient bring.
        "ours forward, tiles' maxima": partial(_ours, impl, 1),
        "ours forward, gradient scaled": partial(_ours, impl, 1, unit_gradient=False),
    } | {name: peer.make for name, peer in PEERS.items()}
    missing = left_out(device)
    return {name: made[name] for name in NAMES if name not in missing}


def left_out(device: torch.device) -> dict[str, str]:
    """Name to reason of all that do not run on this device."""
    untuned = "" if device.type == "cuda" else "tiles of the Triton kernels: needs a CUDA device"
    alike = "" if device.type == "cuda" else "differs by the Triton kernels alone: needs a CUDA device"
    reasons = {
        "ours forward, tiles' maxima": alike,
        "ours forward, gradient scaled": alike,
        "ours forward, tuned": untuned,
        "ours recompute, tuned": untuned,
    } | {name: peer.absent(device) for name, peer in PEERS.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def _ours(
    impl: Any,
    parts: int,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    unit_gradient: bool = True,
) -> Loss:
    """The gradient computed in the forward pass; with `parts` > 1, that many chunks of rows. As the trainer has it."""
    n = targets.shape[0]
    coefficients = torch.full((n,), -1.0 / n, device=hidden.device)
    # The Triton kernels keep logits in the weight's dtype, the plain implementation in float32.
    size = weight.element_size() if hidden.is_cuda and impl != "torch" else 4
    budget = -(-n // parts) * weight.shape[0] * size if parts > 1 else None

    head = HeadOptions(impl=impl, mode="forward", chunk_bytes=budget, validate=False, unit_gradient=unit_gradient)

    def loss() -> torch.Tensor:
        return weighted_logprob(hidden, weight, targets, coefficients, head=head)[0]

    return loss


def _ours_recompute(impl: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Loss:
    """Any loss of the log-probabilities; the backward pass computes the logits again."""
    head = HeadOptions(impl=impl, validate=False)
    return lambda: -linear_logprob(hidden, weight, targets, head=head).mean()


def make_inputs(shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of standard deviation 2, and targets from hopeless to nearly certain, as a trained model has them.

    That matters to those who filter small gradients, and to those whose true-class gradient cancels.
    """
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"device": device, "generator": generator}
    weight = torch.randn(shape.v, shape.d, **options).mul_(2 * shape.d**-0.5)
    targets = torch.randint(shape.v, (shape.n,), **options)
    # log V + 2 is the log-sum-exp of such logits.
    logit = torch.log(torch.tensor(float(shape.v))).item() + 2 + torch.rand(shape.n, 1, **options) * 10 - 5
    chosen = weight[targets]
    hidden = torch.randn(shape.n, shape.d, **options).addcmul_(chosen, logit / chosen.square().sum(1, keepdim=True))
    return hidden.to(shape.dtype).requires_grad_(), weight.to(shape.dtype).requires_grad_(), targets


@lru_cache(maxsize=1)
def timed_inputs(shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same, kept until another shape is asked for."""
    return make_inputs(shape, device)


@dataclass(frozen=True)
class Errors:
    """Relative to float64: the loss, and the Euclidean norm of the worse of dX and dW."""

    loss: float
    gradient: float


ERROR_SHAPE = (512, 256, 8192)


@cache
def _oracle(shape: Shape, device: torch.device) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Inputs, and the loss, dX and dW of full logits in float64, on the CPU."""
    made = make_inputs(shape, device)
    wide = [x.detach().cpu().double().requires_grad_() for x in made[:2]]
    loss = F.cross_entropy(wide[0] @ wide[1].t(), made[2].cpu())
    return made, (loss.detach(), *torch.autograd.grad(loss, wide))


def errors(factory: Factory, shape: Shape, device: torch.device) -> Errors:
    """How far a contender is from full logits in float64."""
    (hidden, weight, targets), expected = _oracle(shape, device)
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = factory(hidden, weight, targets)()
    loss.backward()
    off = []
    for got, want in zip((loss.detach(), hidden.grad, weight.grad), expected, strict=True):
        assert got is not None, "a gradient is missing"
        off.append(float((got.cpu().double() - want).norm() / want.norm()))
    return Errors(off[0], max(off[1:]))


@cache
def errors_of(name: str, dtype: torch.dtype, device: torch.device, impl: str = "auto") -> Errors:
    """The same by name, at a small shape that every contender takes."""
    return errors(contenders(device, impl)[name], Shape(*ERROR_SHAPE, dtype), device)


@dataclass(frozen=True)
class Measured:
    """Median and minimum, and the peak above inputs and the gradients that are the result.

    Where the gradients come after the logits are gone, the backward pass may so need less than the forward pass alone.
    """

    seconds: float
    least: float
    peak_bytes: int | None


def _loop(once: Callable[[], None], rounds: int) -> None:
    for _ in range(rounds):
        once()


def measure(
    factory: Factory,
    shape: Shape,
    device: torch.device,
    backward: bool,
    rounds: int,
    repeat: Callable[[Callable[[], None], int], None] = _loop,
) -> Measured:
    """Time a contender after 3 rounds of warm-up (1 on the CPU).

    Forward alone is without gradients and from inputs that need none, as in an evaluation. Gradients are None at the
    start of each round, as after ``zero_grad``.
    """
    hidden, weight, targets = timed_inputs(shape, device)
    loss = factory(*((hidden, weight) if backward else (hidden.detach(), weight.detach())), targets)
    seconds: list[float] = []

    def once() -> None:
        hidden.grad = weight.grad = None
        synchronize()
        started = time.perf_counter()
        with torch.set_grad_enabled(backward):
            value = loss()
            if backward:
                value.backward()
        synchronize()
        seconds.append(time.perf_counter() - started)

    try:
        _loop(once, 3 if device.type == "cuda" else 1)
        hidden.grad = weight.grad = None
        seconds.clear()
        with PeakMemory() as peak:
            repeat(once, rounds)
    finally:
        hidden.grad = weight.grad = None
    above = None
    if peak.bytes is not None:
        above = max(0, peak.bytes - (hidden.nbytes + weight.nbytes if backward else 0))
    return Measured(statistics.median(seconds), min(seconds), above)


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product in this dtype, measured and recorded once a run."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    rate = 2 * n**3 / roofline._best(lambda: torch.mm(a, b, out=out), 1.0)
    append("roofline", "-", "measured", f"matmul {n} {_DTYPES[dtype]}", {"matmul": (rate, "FLOP/s")})
    return rate


def unsuitable(name: str, shape: Shape, device: torch.device) -> str:
    """Why a contender is not timed at this shape, or "": its logits do not fit into memory, or it takes minutes."""
    if name == "torch linear_cross_entropy" and device.type == "cpu" and shape in CPU_SHAPES[1:]:
        return "its own chunks of a few rows take minutes on a CPU; timed at the first shape alone"
    if reason := peers.unsuitable(name, shape.n, shape.v, shape.dtype):
        return reason
    if name not in FULL_LOGITS:
        return ""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        free -= torch.cuda.memory_allocated(device)
    elif Path("/proc/meminfo").is_file():
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    else:
        return ""
    need = LOGIT_BYTES * shape.n * shape.v + 2 * shape.v * shape.d * shape.dtype.itemsize
    return f"needs about {need / 2**30:.0f} GiB, {free / 2**30:.0f} are free" if need > free else ""


def bench(
    name: str,
    shape: Shape,
    device: torch.device,
    backward: bool,
    rounds: int,
    impl: str = "auto",
    repeat: Callable[[Callable[[], None], int], None] = _loop,
) -> str:
    """Check, time and record one contender at one shape. Returns a line for the reader."""
    with _as_named(name):
        return _bench(name, shape, device, backward, rounds, impl, repeat)


@contextmanager
def _as_named(name: str) -> Iterator[None]:
    """The fastest of the shipped tiles for those named so, the default for the others; likewise tiles' maxima."""
    if name.endswith(", tiles' maxima"):
        from real_kernels import triton_head

        with mock.patch.object(triton_head, "BASE_ROWS", sys.maxsize):
            yield
        return
    before = os.environ.get("REAL_KERNELS_AUTOTUNE")
    os.environ["REAL_KERNELS_AUTOTUNE"] = str(int(name.endswith(", tuned")))
    try:
        yield
    finally:
        del os.environ["REAL_KERNELS_AUTOTUNE"]
        if before is not None:
            os.environ["REAL_KERNELS_AUTOTUNE"] = before


def _bench(
    name: str,
    shape: Shape,
    device: torch.device,
    backward: bool,
    rounds: int,
    impl: str,
    repeat: Callable[[Callable[[], None], int], None],
) -> str:
    error = errors_of(name, shape.dtype, device, impl)
    eager = errors_of("eager", shape.dtype, device)
    measured = measure(contenders(device, impl)[name], shape, device, backward, rounds, repeat)
    share = shape.flops(backward) / measured.seconds / matmul_rate(device, shape.dtype)
    values: dict[str, tuple[float | None, str]] = {
        "seconds": (measured.seconds, "s"),
        "seconds_min": (measured.least, "s"),
        "peak_bytes": (measured.peak_bytes, "B"),
        "of_matmul_rate": (share, "1"),
        "loss_error": (error.loss, "relative"),
    }
    warning = _warning("loss", error.loss, eager.loss)
    if backward:
        values["gradient_error"] = (error.gradient, "relative")
        values["gradient_error_over_eager"] = (error.gradient / eager.gradient, "1")
        warning += _warning("gradient", error.gradient, eager.gradient)
    append("head", shape.model, name, f"N={shape.n} forward{'+backward' if backward else ''}", values)
    peak = "" if measured.peak_bytes is None else f", {measured.peak_bytes / 2**20:7.0f} MiB"
    what = "f+b" if backward else "f  "
    return f"{shape.model} N={shape.n} {what} {name:35} {1e3 * measured.seconds:9.2f} ms{peak}, {share:5.1%}{warning}"


def _warning(what: str, error: float, eager: float) -> str:
    bound = max(TOLERATED * eager, LUCK)
    return "" if error <= bound else f"; {what} off by {error:.1e}, eager's by {eager:.1e}"


def run(device: torch.device, small: bool, deadline: float, impl: str = "auto", names: Collection[str] = NAMES) -> int:
    """Contenders at every shape until `deadline` (of ``time.monotonic``). Returns how many failed.

    What is done is recorded at once, and so is what does not run here, with its reason; whatever goes wrong in one
    contender is said, and the others go on.
    """
    try:
        return _run(device, small, deadline, impl, names)
    finally:
        timed_inputs.cache_clear()


def _run(device: torch.device, small: bool, deadline: float, impl: str, names: Collection[str]) -> int:
    failed = 0
    for name, reason in left_out(device).items():
        if name in names:
            print(f"head: {name} left out: {reason}", flush=True)
            append_absence("head", name, reason)
    rounds = 2 if small else default_rounds(device)
    for shape in shapes(device, small):
        rate = matmul_rate(device, shape.dtype)
        for name in contenders(device, impl):
            if name not in names:
                continue
            if reason := unsuitable(name, shape, device):
                print(f"head: {name} left out at {shape.model} N={shape.n}: {reason}", flush=True)
                append_absence("head", name, reason, shape.model)
                continue
            for backward in (True, False):
                expected = (rounds + 3) * shape.flops(backward) / (0.3 * rate)
                if time.monotonic() + expected > deadline:
                    print(f"head: stopped at {shape.model} N={shape.n} {name}: no time left", flush=True)
                    return failed
                try:
                    print(bench(name, shape, device, backward, rounds, impl), flush=True)
                except Exception as error:
                    failed += 1
                    first = (str(error).splitlines() or [""])[0]
                    print(f"head: {shape.model} {name} failed: {type(error).__name__}: {first}", flush=True)
                finally:
                    gc.collect()
    return failed
