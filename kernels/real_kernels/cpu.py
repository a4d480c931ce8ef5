"""What this CPU multiplies fast: whether bfloat16 products gain anything over float32 ones, or lose."""

from __future__ import annotations

import time
from functools import cache

import torch

# A product of [rows, inner] and [inner, columns]: 34 MFLOP, from 0.1 to 5 ms.
ROWS, INNER, COLUMNS = 128, 256, 512
SECONDS = 0.05
# How much faster bfloat16 has to be: twice with the instructions, a third to a sixth as fast without them.
GAIN = 1.25


@cache
def has_fast_bf16() -> tuple[bool, str]:
    """Whether bfloat16 matrix products on this CPU are faster than float32 ones, and why that is thought.

    oneDNN, which PyTorch multiplies with, has to have bfloat16 products for this CPU (``ONEDNN_MAX_CPU_ISA`` counts);
    then a measurement of 50 ms decides, since what oneDNN emulates is slower than float32. Asked once per process.
    """
    if not torch.backends.mkldnn.is_available():
        return False, "PyTorch is built without oneDNN, so bfloat16 products are slow on the CPU"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False, "oneDNN finds no bfloat16 instructions on this CPU"
    half, full = _seconds()
    flops = 2e-9 * ROWS * INNER * COLUMNS
    rates = (
        f"bfloat16 products run at {flops / half:.0f} GFLOP/s a thread on this CPU, float32 ones at {flops / full:.0f}"
    )
    return full > GAIN * half, rates


def _seconds() -> tuple[float, float]:
    """The shortest times of the product in bfloat16 and in float32, measured in turn on one thread.

    Several threads wait for each other, which on a busy machine is all that would be measured.
    """
    operands = [
        (torch.ones(ROWS, INNER, dtype=dtype), torch.ones(COLUMNS, INNER, dtype=dtype))
        for dtype in (torch.bfloat16, torch.float32)
    ]
    best = [float("inf"), float("inf")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for a, b in operands:  # builds the kernels
                torch.mm(a, b.t())
            stop = time.perf_counter() + SECONDS
            while time.perf_counter() < stop:
                for i, (a, b) in enumerate(operands):
                    start = time.perf_counter()
                    torch.mm(a, b.t())
                    best[i] = min(best[i], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return best[0], best[1]
