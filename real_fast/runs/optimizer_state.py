"""An optimiser's state as whole tensors by name, for safetensors, whatever the number of ranks.

Moments in 8 bits (torchao's) are three tensors: codes, a scale for each block of 256 numbers, and the table of what a
code stands for. A sharded moment is kept in 8 bits by the ranks whose part has 4096 numbers or more, in whole blocks,
and in float32 by the others. Where all are in 8 bits, theirs behind one another are the whole moment's, since the parts
are whole blocks. Where some are not, the whole moment is written in float32, and whoever keeps it in 8 bits rounds it
once more when it is read: such a run goes on from values that differ by that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from real_fast.distributed.shard import whole
from real_fast.distributed.slices import TensorFiles, local_part
from real_fast.distributed.world import ALONE, World

_CODES, _SCALE, _TABLE = "codes", "scale", "qmap"
_KIND = "moments"  # in the files' metadata


def metadata(optimizer: Any) -> dict[str, str]:
    """What the files say of moments that are in 8 bits, where they are large enough."""
    return {_KIND: "8 bits"} if _is_8_bits(optimizer) else {}


@torch.no_grad()
def tensors_of(model: nn.Module, optimizer: Any, world: World = ALONE) -> Iterator[tuple[str, torch.Tensor]]:
    """``NAME:MOMENT``, or ``NAME:MOMENT:PART``, of every parameter that the optimiser has a state of.

    All ranks go through these together. A sharded tensor is made whole when it is its turn; others are the optimiser's
    own.
    """
    # By name, since the order in a state is another after it was restored.
    found = [
        (f"{name}:{key}", torch.as_tensor(value))
        for name, parameter in model.named_parameters()
        for key, value in sorted(optimizer.state.get(parameter, {}).items())
    ]
    in_8_bits = _agree(found, world)
    for name, value in found:
        local = _local(value)
        if name in in_8_bits and isinstance(value, DTensor):
            yield f"{name}:{_CODES}", _gathered(value, local.codes if local.numel() else local.to(torch.uint8))
            scale = local.scale if local.numel() else local.flatten()
            yield f"{name}:{_SCALE}", _gathered_scale(value, scale, optimizer.block_size)
            yield f"{name}:{_TABLE}", _table(optimizer, signed=name.endswith(":exp_avg"))
        elif name in in_8_bits:
            yield from ((f"{name}:{part}", tensor) for part, tensor in _parts(local).items())
        elif isinstance(value, DTensor):
            yield name, _gathered(value, local.dequantize().to(value.dtype) if _parts(local) else local)
        else:
            yield name, whole(value)


def local_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of this rank's part of the state."""
    values = [_local(torch.as_tensor(v)) for state in optimizer.state.values() for v in state.values()]
    tensors = [t for value in values for t in (dict(_parts(value)).values() or [value])]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def restore(model: nn.Module, optimizer: torch.optim.Optimizer, files: TensorFiles) -> list[str]:
    """Give a fresh optimiser the state that :func:`tensors_of` made; of sharded tensors, this rank's part is read.

    Returns:
        Names of trained parameters without a state.

    Raises:
        ValueError: The state is of another kind of optimiser, or of parameters of other shapes.
    """
    states: dict[str, dict[str, set[str]]] = {}
    for name in sorted(files.names):
        parameter_name, _, key = name.partition(":")
        key, _, part = key.partition(":")
        states.setdefault(parameter_name, {}).setdefault(key, set()).add(part)
    missing = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in states:
            missing.append(name)
        elif parameter.requires_grad:
            optimizer.state[parameter] = {}
            for key, parts in states[name].items():
                empty = _empty(optimizer, parameter, key)
                _fill(f"{name}:{key}", empty, parts, files, _is_8_bits(optimizer))
                optimizer.state[parameter][key] = empty
    return missing


def _is_8_bits(optimizer: Any) -> bool:
    return hasattr(optimizer, "_new_buffer")


def _local(value: torch.Tensor) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _parts(value: Any) -> dict[str, torch.Tensor]:
    """Codes, scale and table of a moment in 8 bits; nothing of another."""
    if not is_traceable_wrapper_subclass(value):
        return {}
    return {name: getattr(value, name) for name in value.__tensor_flatten__()[0]}


def _agree(found: list[tuple[str, torch.Tensor]], world: World) -> set[str]:
    """Names of what every rank that has a part of it has in 8 bits."""
    locals_ = [(name, _local(value)) for name, value in found]
    said = world.gather(
        (
            {name for name, local in locals_ if _parts(local)},
            {name for name, local in locals_ if not _parts(local) and local.numel()},
        )
    )
    return set().union(*(yes for yes, _ in said)).difference(*(no for _, no in said))


def _gathered(like: DTensor, local: torch.Tensor) -> torch.Tensor:
    """All ranks' parts of a tensor that is spread as `like` is."""
    spread = DTensor.from_local(
        local.contiguous(), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole(spread)


def _gathered_scale(like: DTensor, local: torch.Tensor, block: int) -> torch.Tensor:
    """[numel / block] the scales of all ranks' blocks."""
    if Shard(0) not in like.placements:
        return local
    dim = like.placements.index(Shard(0))
    rows, ranks = like.shape[0], like.device_mesh.size(dim)
    # As torch.chunk has it: parts of equally many rows, then a shorter one, then those without any.
    padded = local.new_zeros(-(-rows // ranks) * (like.numel() // rows) // block)
    padded[: local.numel()] = local
    spread = DTensor.from_local(padded, like.device_mesh, like.placements, run_check=False)
    return whole(spread)[: like.numel() // block]


def _table(optimizer: Any, signed: bool) -> torch.Tensor:
    found: torch.Tensor = optimizer._new_buffer(torch.empty(4096), signed).qmap
    return found


def _empty(optimizer: Any, parameter: torch.Tensor, key: str) -> torch.Tensor:
    """What the optimiser would make, where it would."""
    home, in_8_bits = getattr(optimizer, "home", parameter.device), _is_8_bits(optimizer)
    if key == "step":
        return torch.zeros((), device="cpu" if in_8_bits else parameter.device)
    like = torch.empty_like(parameter, device=home)
    made: torch.Tensor = optimizer._new_buffer(like, key == "exp_avg") if in_8_bits else like
    return made


def _fill(name: str, empty: torch.Tensor, parts: set[str], files: TensorFiles, in_8_bits: bool) -> None:
    """Read this rank's part of a moment, from 8 bits or not into 8 bits or not; `in_8_bits` is the optimiser."""
    local, stored = _local(empty), f"{name}:{_CODES}" if _CODES in parts else name
    own = _parts(local)
    rounded = files.metadata.get(_KIND) == "8 bits"  # an earlier version did not say so
    if _CODES in parts:
        fits = in_8_bits and parts == {_CODES, _SCALE, _TABLE}
    else:
        fits = parts == {""} and (in_8_bits if rounded else not own and files.dtype(name) == local.dtype)
    if not fits or files.shape(stored) != tuple(empty.shape):
        raise ValueError(f"{name} is of another kind or shape")
    if _CODES not in parts:
        local.copy_(files.local(name, empty))  # into 8 bits, this rounds
        return
    shape, offset = local_part(empty)
    codes = files.block(stored, shape, offset)
    scale, table = files.whole(f"{name}:{_SCALE}"), files.whole(f"{name}:{_TABLE}")
    block = empty.numel() // scale.numel()
    start = offset[0] * (empty.numel() // empty.shape[0])
    if own and local.block_size == block and start % block == 0:
        own[_CODES].copy_(codes)
        own[_SCALE].copy_(scale[start // block :][: codes.numel() // block])
    else:
        scales = scale[torch.arange(start, start + codes.numel()) // block]
        local.copy_((table[codes.flatten().long()] * scales).view(shape))
