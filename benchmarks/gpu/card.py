"""What the numbers that follow are measured on: versions, clocks, power, and what a product and a copy reach."""

from __future__ import annotations

import shutil
import subprocess

import torch

from benchmarks import roofline
from benchmarks.gpu.stages import Check
from benchmarks.machine import machine, synchronize

# What nvidia-smi is asked for, a query of its own each: not every driver and card knows all.
ASKED = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "clocks_throttle_reasons.active",
    "ecc.mode.current",
    "mig.mode.current",
)
SMI = "nvidia-smi"
PATIENCE = 20.0  # seconds for an answer of nvidia-smi


def measure(check: Check, _: float) -> int:
    """Say and record all of it. Always 0: what cannot be asked is said to be so."""
    for name, value in machine().items():
        print(f"{name}: {value}")
    if check.device.type == "cuda":
        card = torch.cuda.get_device_properties(check.device)
        print(
            f"compute capability {card.major}.{card.minor}, {card.multi_processor_count} multiprocessors, "
            f"{card.total_memory / 2**30:.0f} GiB"
        )
    print(f"idle: {state()}")
    check.peak = roofline.measure(check.device, 0.2 if check.small else 2.0)
    print(f"measured peak: {check.peak.flops / 1e12:.1f} TFLOP/s, {check.peak.bandwidth / 1e12:.2f} TB/s")
    if check.device.type == "cuda":
        print(f"under load: {_under_load(check.device)}")
    return 0


def state() -> str:
    """Clocks, power and temperature as the driver tells them, or why it does not."""
    if shutil.which(SMI) is None:
        return f"{SMI} is not installed here"
    found = []
    try:
        whole = _ask(",".join(ASKED))
        values = whole.split(", ") if whole else [_ask(name) for name in ASKED]
    except subprocess.TimeoutExpired:
        return f"{SMI} gave no answer in {PATIENCE:.0f} s"
    for name, value in zip(ASKED, values, strict=False):
        if value:
            found.append(f"{name} {value}")
    return ", ".join(found) or f"{SMI} answers none of it"


def _ask(names: str) -> str:
    """The answer for the first card; "" where the driver knows no such thing."""
    command = [SMI, f"--query-gpu={names}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    return "" if done.returncode else (done.stdout.splitlines() or [""])[0].strip()


def _under_load(device: torch.device, seconds: float = 1.5) -> str:
    """The state while products that were asked for beforehand keep the card busy."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(int(seconds / 1.5e-3)):  # of some 1.5 ms on an H100
        torch.mm(a, b, out=out)
    found = state()
    synchronize()
    return found
