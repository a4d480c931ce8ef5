"""What the operators share: their inputs by name, and their results, which are tensors alone.

An empty tensor stands for a gradient that nobody requires.
"""

from __future__ import annotations

import inspect
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from real_kernels.head import Gradients, GradMask
from real_kernels.main_grad import check_added, demand_one
from real_kernels.matmul import accum_dtype


def inputs_of(function: Callable[..., Any]) -> Any:
    """A named tuple with the parameters of an operator's function as fields, each None by default.

    By position is how PyTorch hands inputs to the fake implementation and to ``setup_context``, and takes gradients.
    """
    names = list(inspect.signature(function).parameters)
    return namedtuple(f"{function.__name__}_inputs", names, defaults=[None] * len(names))


def none(like: Tensor) -> Tensor:
    """An empty tensor of the same dtype and device."""
    return like.new_empty(0)


def or_none(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor, or an empty one."""
    return none(like) if tensor is None else tensor


def empty_accum(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised tensor in the dtype that sums of `like` are kept in, float32 or float64."""
    return like.new_empty(shape, dtype=accum_dtype(like.dtype))


def tensors(gradients: Gradients, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As an operator returns them."""
    a, b, c = gradients
    return or_none(a, weight), or_none(b, weight), or_none(c, weight)


def fake_gradients(n: int, weight: Tensor, needs: GradMask) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of :func:`tensors`."""
    v, d = weight.shape
    return (
        weight.new_empty(n, d) if needs.hidden else none(weight),
        weight.new_empty(v, d) if needs.weight else none(weight),
        weight.new_empty(v) if needs.bias else none(weight),
    )


def mask_grads(gradients: Sequence[Tensor], required: Sequence[bool]) -> list[Tensor | None]:
    """The gradients as autograd takes them from a backward pass: None in place of those not required."""
    return [g if needed else None for g, needed in zip(gradients, required, strict=True)]


def scaled(ctx: Any, grad: Tensor, required: Sequence[bool]) -> list[Tensor | None]:
    """Those required of the gradients that the forward pass saved, times the upstream gradient, a scalar.

    Args:
        ctx: The operator's; `impl` and `unit_gradient` are there.
        grad: The upstream gradient.
        required: Which gradients.

    Raises:
        RuntimeError: Under ``create_graph=True``: these gradients are constants, and a second derivative would be 0. Or
            an upstream gradient other than 1 where it was said to be 1, or the weight's gradient was added in place.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("the head has no second derivative: call backward() or grad() without create_graph")
    gradients, one = ctx.saved_tensors, check_added(ctx, grad)
    if ctx.unit_gradient and not one:
        what = "HeadOptions(unit_gradient=True) is for backward() on the loss itself"
        demand_one(grad, what, "leave it out")
        one = True
    # A loss that backward() is called on has 1. To look is free on the CPU alone, and not for tensors being traced.
    if one or (type(grad) is Tensor and grad.device.type == "cpu" and float(grad) == 1.0):
        return mask_grads(gradients, required)
    times = torch.ops.real_kernels.scaled
    return [times(g, grad, ctx.impl) if needed else None for g, needed in zip(gradients, required, strict=True)]


@torch.library.custom_op("real_kernels::scaled", mutates_args=())
def _scaled(x: Tensor, factor: Tensor, impl: str) -> Tensor:
    """x times a scalar tensor, into a new one (what is saved must serve a second backward pass), in float32."""
    if impl == "triton":
        from real_kernels.triton_head import scaled as in_one_launch

        return in_one_launch(x, factor)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    step = max(1, 2**24 // max(1, x[:1].numel()))
    for start in range(0, x.shape[0], step):
        out[start : start + step] = x[start : start + step].to(factor.dtype) * factor
    return out


@_scaled.register_fake
def _(x: Tensor, factor: Tensor, impl: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def products(weights: Tensor, logp: Tensor) -> Tensor:
    """Sum of weight times log-probability; a weight of 0 makes 0 of -inf too."""
    return torch.where(weights != 0, weights * logp, 0.0).sum()


def spread(values: Tensor, index: Tensor | None, n: int, fill: float) -> Tensor:
    """Rows of a selection at their places among n."""
    if index is None:
        return values.contiguous()
    return values.new_full((n, *values.shape[1:]), fill).index_copy_(0, index, values)
