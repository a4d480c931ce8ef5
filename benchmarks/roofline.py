"""What this machine reaches at best, measured on the spot: a large matrix product and a large copy."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from benchmarks.machine import synchronize
from benchmarks.record import append


@dataclass(frozen=True)
class Roofline:
    """FLOP/s of a bf16 matrix product, and bytes/s read and written by a copy."""

    flops: float
    bandwidth: float


def _best(work: object, seconds: float) -> float:
    """Fastest run of `work` within about so many seconds; one at least behind that which warms up."""
    best = float("inf")
    work()  # type: ignore[operator]
    end = time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        synchronize()
        started = time.perf_counter()
        work()  # type: ignore[operator]
        synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def measure(device: torch.device, seconds: float = 2.0) -> Roofline:
    """Measure and record."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    flops = 2 * n**3 / _best(lambda: torch.mm(a, b, out=out), seconds)
    source = torch.randn(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source), seconds)
    append(
        "roofline",
        "-",
        "measured",
        f"matmul {n}, copy {source.nbytes / 2**30:g} GiB",
        {"matmul": (flops, "FLOP/s"), "copy": (bandwidth, "B/s")},
    )
    return Roofline(flops, bandwidth)
