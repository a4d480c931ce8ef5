"""``weight.main_grad``: a float32 sum that the gradient of the head's weight is added to, in place of ``weight.grad``.

Without it, every call makes a [V, D] gradient in the weight's dtype, and autograd casts it and adds it up: for a 16-bit
copy of a float32 weight, 30 bytes a number and call are read and written. With it, the matrix product adds to the sum:
8 bytes for each chunk of rows. The name and the meaning are those of Megatron-LM's fused weight gradients.

Eager code alone: an operator of ``torch.library`` that has a gradient may change none of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from real_kernels.matmul import accum_dtype


def main_grad_of(weight: torch.Tensor) -> torch.Tensor | None:
    """The weight's ``main_grad`` [V, D], where it has one and a gradient is required.

    Raises:
        ValueError: It is of another shape or device, or not float32 (float64 for a float64 weight); or the call is
            being compiled.
    """
    total: torch.Tensor | None = getattr(weight, "main_grad", None)
    if total is None or not (weight.requires_grad and torch.is_grad_enabled()):
        return None
    if torch.compiler.is_compiling():
        raise ValueError("weight has a main_grad, which compiled code cannot add to: take it away, or do not compile")
    dtype = accum_dtype(weight.dtype)
    if total.shape != weight.shape or total.dtype != dtype or total.device != weight.device:
        raise ValueError(
            f"weight.main_grad must be {list(weight.shape)} in {dtype} on {weight.device}, and is {list(total.shape)} "
            f"in {total.dtype} on {total.device}"
        )
    return total


def adding(
    forward: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., tuple[Any, ...]]
) -> Any:
    """An operator's function and its gradient as a ``torch.autograd.Function`` with one more input, ``main_grad``.

    Args:
        forward: Takes the operator's inputs by position, and ``main_grad``.
        setup_context: As the operator's; ``ctx.main_grad`` is there.
        backward: As the operator's.
    """

    class Adding(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return forward(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            *others, ctx.main_grad = inputs
            ctx.added = False
            setup_context(ctx, tuple(others), output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return (*backward(ctx, *grads), None)

    return Adding.apply


def check_added(ctx: Any, grad: torch.Tensor) -> bool:
    """Before a backward pass whose forward pass has added to ``ctx.main_grad``: as if the upstream gradient were 1.

    Returns:
        Whether there is a ``ctx.main_grad``, hence an upstream gradient of 1.

    Raises:
        RuntimeError: It is not 1 (on a GPU, which is not waited for, the device fails), or this is the second time.
    """
    if getattr(ctx, "main_grad", None) is None:
        return False
    what = "the head's gradient was added to weight.main_grad in the forward pass, for backward() on the loss itself"
    if ctx.added:
        raise RuntimeError(f"{what}, once: a second backward pass would leave it out")
    ctx.added = True
    demand_one(grad, what, 'take HeadOptions(mode="recompute")')
    return True


def demand_one(grad: torch.Tensor, what: str, instead: str) -> None:
    """Raise a RuntimeError for an upstream gradient, a scalar, that is not 1.

    On a GPU, which is not waited for, the device fails instead; in code that is being traced, what was traced does.
    """
    if type(grad) is not torch.Tensor or grad.device.type != "cpu":
        torch._assert_async(grad == 1, what)
    elif float(grad) != 1.0:
        raise RuntimeError(f"{what}, and its gradient here is {float(grad)}: {instead}")
