"""What the options' "auto" and None come to for the tensors of a call. Nothing here looks at a tensor's values."""

from __future__ import annotations

import importlib.util

import torch

from real_kernels.checks import check_bias, check_head
from real_kernels.head import CHUNK_BYTES, TRITON_CHUNK_BYTES, head_class
from real_kernels.matmul import HALF
from real_kernels.options import HeadOptions, Impl


def resolve_head(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, head: HeadOptions
) -> tuple[str, int]:
    """Check the tensors that all functions share, and decide how the head computes.

    Args:
        hidden: [N, D] hidden states.
        weight: [V, D] weight of the lm_head.
        bias: [V] of the lm_head, or None.
        head: The caller's options.

    Returns:
        "torch" or "triton", and the most bytes of logits alive at a time.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit, or an implementation that cannot run here; the message
            names the argument.
    """
    if hasattr(weight, "full_tensor"):
        raise ValueError(
            "weight is sharded (a DTensor): call the loss inside the forward of the module that FSDP2 wraps, "
            "or pass weight.full_tensor()"
        )
    check_head(hidden, weight)
    check_bias(bias, weight)
    impl = _implementation(head.impl, hidden)
    return impl, head.chunk_bytes or (TRITON_CHUNK_BYTES if impl == "triton" else CHUNK_BYTES)


def gradient_in_forward(head: HeadOptions, impl: str, chunk_bytes: int, weight: torch.Tensor, rows: int) -> bool:
    """Whether the gradient is computed in the forward pass.

    Args:
        head: The caller's options.
        impl: As :func:`resolve_head` decided.
        chunk_bytes: The same.
        weight: [V, D] weight of the lm_head.
        rows: Number of rows with a target.

    Raises:
        ValueError: A mode that the implementation lacks.
    """
    if head.mode == "forward" and impl == "triton" and head.softcap is not None:
        raise ValueError('mode must be "recompute" (or "auto") for a softcap with impl "triton"')
    if head.mode == "auto":
        return head_class(impl)(weight, None, head.softcap, chunk_bytes).forward_by_default(rows)
    return head.mode == "forward"


def required_grads(*tensors: torch.Tensor | None) -> tuple[bool, ...]:
    """Which tensors a gradient must be computed for."""
    return tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)


def _implementation(impl: Impl, hidden: torch.Tensor) -> str:
    installed = importlib.util.find_spec("triton") is not None
    if impl == "auto":
        return "triton" if hidden.is_cuda and hidden.dtype in HALF and installed else "torch"
    if impl == "triton":
        if not installed:
            raise ValueError('impl is "triton", which is not installed: pip install triton, or take impl="torch"')
        from real_kernels.triton_head import DTYPES, available

        if hidden.dtype not in DTYPES:
            raise ValueError(f'impl is "triton", which does not take {hidden.dtype}: take impl="torch"')
        if not available(hidden.device):
            raise ValueError(
                f'impl is "triton", which needs a GPU, and hidden is on {hidden.device}: take impl="auto" (or set '
                "TRITON_INTERPRET=1 before the program starts, to run the kernels slowly on the CPU)"
            )
    return impl
