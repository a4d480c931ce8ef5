"""What every public function checks and decides from its arguments without looking at values."""

from __future__ import annotations

import importlib.util

import torch

from real_kernels.checks import check_bias, check_head, check_softcap, check_temperature
from real_kernels.head import CHUNK_BYTES, TRITON_CHUNK_BYTES, Impl, Mode, make_head
from real_kernels.matmul import HALF


def check_options(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    impl: Impl,
    chunk_bytes: int | None,
) -> tuple[str, int]:
    """Check the arguments that all functions share; returns "torch" or "triton", and the byte budget.

    Raises:
        ValueError: The message names the argument.
    """
    if hasattr(weight, "full_tensor"):
        raise ValueError(
            "weight is sharded (a DTensor): call the loss inside the forward of the module that FSDP2 wraps, "
            "or pass weight.full_tensor()"
        )
    check_head(hidden, weight)
    check_bias(bias, weight)
    check_temperature(temperature)
    check_softcap(softcap)
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, not {chunk_bytes}")
    chosen = _implementation(impl, hidden)
    return chosen, chunk_bytes or (TRITON_CHUNK_BYTES if chosen == "triton" else CHUNK_BYTES)


def gradient_in_forward(
    mode: Mode, impl: str, weight: torch.Tensor, softcap: float | None, chunk_bytes: int, rows: int
) -> bool:
    """Whether the gradient is computed in the forward pass.

    Raises:
        ValueError: An unknown mode, or one that the implementation lacks.
    """
    if mode not in ("auto", "forward", "recompute"):
        raise ValueError(f'mode must be "auto", "forward" or "recompute", not {mode!r}')
    if mode == "forward" and impl == "triton" and softcap is not None:
        raise ValueError('mode must be "recompute" (or "auto") for a softcap with impl "triton"')
    if mode == "auto":
        return make_head(impl, weight, None, softcap, chunk_bytes).forward_by_default(rows)
    return mode == "forward"


def wanted(*tensors: torch.Tensor | None) -> tuple[bool, ...]:
    """Which tensors a gradient must be computed for."""
    return tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)


def _implementation(impl: Impl, hidden: torch.Tensor) -> str:
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'impl must be "auto", "triton" or "torch", not {impl!r}')
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
