"""Which number format matrix products are computed in: ``train.precision``."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

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


def rounded_weights(model: Any, half: torch.dtype | None, device: torch.device) -> set[int]:
    """Ids of the parameters that every product rounds to `half`, so that 16 bits hold all that is used of them.

    These are the linear layers' under autocast. The embedding's and the norms' float32 values are used as they are; the
    head's product is in 16 bits on CUDA alone, see Policy.forward, and a tied head is the embedding.

    Args:
        model: A Transformers causal language model.
        half: Dtype of autocast; None where there is none.
        device: Where it computes.
    """
    if half is None:
        return set()
    whole = {id(model.get_input_embeddings().weight)}
    if device.type != "cuda":
        whole.add(id(model.get_output_embeddings().weight))
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return {id(p) for module in linear for p in module.parameters(recurse=False)} - whole
