"""What the operators share. Their results are tensors alone: an empty one stands for a gradient nobody wants."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from real_kernels.head import Gradients, Needs
from real_kernels.matmul import accumulator


def none(like: Tensor) -> Tensor:
    """An empty tensor of the same dtype and device."""
    return like.new_empty(0)


def or_none(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor, or an empty one."""
    return none(like) if tensor is None else tensor


def wide(like: Tensor, *shape: int) -> Tensor:
    """Room in float32 (float64)."""
    return like.new_empty(shape, dtype=accumulator(like.dtype))


def tensors(gradients: Gradients, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As an operator returns them."""
    a, b, c = gradients
    return or_none(a, weight), or_none(b, weight), or_none(c, weight)


def fake_gradients(n: int, weight: Tensor, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of :func:`tensors`."""
    v, d = weight.shape
    return (
        weight.new_empty(n, d) if needs.hidden else none(weight),
        weight.new_empty(v, d) if needs.weight else none(weight),
        weight.new_empty(v) if needs.bias else none(weight),
    )


def wanted(gradients: Any, needs: Needs) -> tuple[Tensor | None, ...]:
    """As autograd wants them from a backward pass."""
    return tuple(g if want else None for g, want in zip(gradients, needs, strict=True))


def scaled(gradients: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Times the upstream gradient, a scalar."""
    # A loss that backward() is called on has 1. To look is free on the CPU alone, and not for tensors being traced.
    if type(grad) is Tensor and grad.device.type == "cpu" and float(grad) == 1.0:
        return tuple(gradients)
    # Into new tensors: those saved must serve a second backward pass.
    return tuple(None if g is None else g * grad.to(g.dtype) for g in gradients)


def spread(values: Tensor, index: Tensor | None, n: int, fill: float) -> Tensor:
    """Rows of a selection at their places among n."""
    if index is None:
        return values.contiguous()
    return values.new_full((n, *values.shape[1:]), fill).index_copy_(0, index, values)
