"""Spreading a model over ranks by torch's FSDP2 (``fully_shard``): each holds a slice of every weight.

A layer's weights are whole while it computes and at no other time. The embedding is a unit of its own; the last norm
and the head, which the loss needs as one tensor, belong to the root and are whole from the forward to the end of the
backward pass. Gradients are added up over ranks, not averaged: a loss is divided by the counts of the whole update.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def shard(
    root: nn.Module,
    units: Iterable[nn.Module],
    mesh: DeviceMesh,
    dtype: torch.dtype | None = None,
    root_dtype: torch.dtype | None = None,
) -> None:
    """Shard `root` in place; parameters become DTensors, on whatever device they are ("meta" included).

    Args:
        root: The module that is called; what its ``forward`` gets is handed on as it is.
        units: Modules in it that are gathered and freed by themselves.
        mesh: The ranks, in a line, or (replicas, ranks of one).
        dtype: What the units' weights are gathered in; None for their own. Gradients are added up in float32. What goes
            through a unit stays in the dtype that it has: autocast decides what is computed in which.
        root_dtype: The same for the rest of the root.
    """
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=_precision(dtype))
    fully_shard(root, mesh=mesh, mp_policy=_precision(root_dtype))
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    root.register_forward_hook(_free)


def _precision(dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    reduce = None if dtype is None else torch.float32
    # A cast of inputs would round labels and the engine's log-probabilities, and what is handed from layer to layer.
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce, cast_forward_inputs=False)


def _free(root: nn.Module, inputs: object, output: object) -> None:
    """Without a backward pass, nothing else would free the root's own weights."""
    if not torch.is_grad_enabled():
        assert isinstance(root, FSDPModule)
        root.reshard()


def is_sharded(module: nn.Module) -> bool:
    """Whether :func:`shard` has spread it."""
    return isinstance(module, FSDPModule)


def whole(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor made whole on every rank (all of them call this); one that is not sharded, as it is.

    Args:
        tensor: A DTensor, or any other.
        dtype: Of the result; the slices are cast, so that no more than that is sent. None for the tensor's own.
    """
    tensor = tensor.detach()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's slice of a tensor, sharing its memory; of one that is not sharded, the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_bytes(root: nn.Module) -> int:
    """Bytes of gathered weights that this rank holds at the moment: 0 outside an update."""
    found = {}
    for module in root.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(parameter, DTensor):
                continue
            found[id(parameter)] = parameter.untyped_storage().nbytes()
    return sum(found.values())
