"""Which number format matrix products are computed in: ``train.precision``."""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal

import torch

from real_kernels.cpu import has_fast_bf16

logger = logging.getLogger(__name__)
Precision = Literal["bf16", "fp32"]
_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def resolve(wanted: Literal["auto", "bf16", "fp32"], device: torch.device) -> Precision:
    """The precision of ``train.precision`` on this device; "auto" says in one line what it takes and why.

    "auto" is bf16 on a GPU that computes in it and on a CPU whose bf16 products are faster than its fp32 ones.
    """
    if wanted != "auto":
        return wanted
    return _auto(device.type)


def dtype_of(precision: Precision) -> torch.dtype:
    """torch.bfloat16 or torch.float32."""
    return _DTYPES[precision]


@cache
def _auto(device: str) -> Precision:
    """Asked, and said, once per process and kind of device."""
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        why = f"{torch.cuda.get_device_name()} {'has' if fast else 'has no'} bf16 instructions"
    elif device == "cpu":
        fast, why = has_fast_bf16()
    else:
        fast, why = False, f"bf16 is not tried on {device}"
    precision: Precision = "bf16" if fast else "fp32"
    logger.info("precision %s: %s", precision, why)
    return precision
