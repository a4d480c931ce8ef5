"""An optimiser's state as tensors by name, for safetensors: moments in 8 bits are several tensors each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """``NAME:MOMENT``, or ``NAME:MOMENT:PART``, of every parameter that the optimiser has a state of; on the CPU."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            for part, tensor in _parts(torch.as_tensor(value)):
                found[f"{name}:{key}{part}"] = tensor.detach().cpu().contiguous()
    return found


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Give a fresh optimiser the state that :func:`tensors_of` made.

    Returns:
        Names of trained parameters without a state.

    Raises:
        ValueError: The state is of another kind of optimiser, or of parameters of other shapes.
    """
    states: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        parameter_name, _, key = name.partition(":")
        key, _, part = key.partition(":")
        states.setdefault(parameter_name, {}).setdefault(key, {})[part] = tensor
    missing = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in states:
            missing.append(name)
        elif parameter.requires_grad:
            optimizer.state[parameter] = {
                key: _filled(f"{name}:{key}", _empty(optimizer, parameter, key), parts)
                for key, parts in states[name].items()
            }
    return missing


def _parts(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if is_traceable_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()
        yield from ((f":{name}", getattr(value, name)) for name in names)
    else:
        yield "", value


def _empty(optimizer: Any, parameter: torch.Tensor, key: str) -> torch.Tensor:
    """What the optimiser would make, where it would."""
    home, torchao = getattr(optimizer, "home", parameter.device), hasattr(optimizer, "_new_buffer")
    if key == "step":
        return torch.zeros((), device="cpu" if torchao else parameter.device)
    like = torch.empty_like(parameter, device=home)
    made: torch.Tensor = optimizer._new_buffer(like, key == "exp_avg") if torchao else like
    return made


def _filled(name: str, empty: torch.Tensor, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    own = {part.removeprefix(":"): tensor for part, tensor in _parts(empty)}
    shapes = {part: (tensor.shape, tensor.dtype) for part, tensor in parts.items()}
    if shapes != {part: (tensor.shape, tensor.dtype) for part, tensor in own.items()}:
        raise ValueError(f"{name} is of another kind or shape")
    for part, tensor in own.items():
        tensor.copy_(parts[part])
    return empty
