"""Argument checks shared by the public functions: wrong input is a ValueError that names the argument."""

from __future__ import annotations

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_head(hidden: torch.Tensor, weight: torch.Tensor, name: str = "hidden") -> None:
    """Hidden states [N, D] and weight [V, D]: two dimensions, one float dtype, one device, equal D."""
    for label, tensor in ((name, hidden), ("weight", weight)):
        if tensor.dim() != 2:
            raise ValueError(f"{label} must have two dimensions, not shape {tuple(tensor.shape)}")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{label} must be float16, bfloat16, float32 or float64, not {tensor.dtype}")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name} has {hidden.shape[1]} columns and weight {weight.shape[1]}: both must be the hidden size"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"{name} is {hidden.dtype} and weight {weight.dtype}: cast one to the other's dtype first")
    if hidden.device != weight.device:
        raise ValueError(f"{name} is on {hidden.device} and weight on {weight.device}")


def check_index(
    name: str, index: torch.Tensor, shape: tuple[int, ...], limit: int, device: torch.device, validate: bool = True
) -> None:
    """An int64 tensor of one shape with values in 0..limit-1; values are looked at only if `validate`."""
    if index.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, not {index.dtype}")
    check_shape(name, index, shape, device)
    if validate and index.numel() and not bool(((index >= 0) & (index < limit)).all()):
        low, high = int(index.min()), int(index.max())
        raise ValueError(f"{name} must lie in 0..{limit - 1}, and spans {low}..{high}")


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """A tensor's exact shape and device."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and hidden on {device}")


def check_score_ids(score_ids: torch.Tensor, vocabulary: int, device: torch.device, validate: bool = True) -> None:
    """K different token ids; values are looked at only if `validate`."""
    if score_ids.dim() != 1 or not score_ids.numel():
        raise ValueError(f"score_ids must be a list of token ids, not shape {tuple(score_ids.shape)}")
    check_index("score_ids", score_ids, tuple(score_ids.shape), vocabulary, device, validate)
    if validate and len(set(score_ids.tolist())) != score_ids.numel():
        raise ValueError(f"score_ids must be different tokens, and are {score_ids.tolist()}")


def check_temperature(temperature: float) -> None:
    """A finite temperature above 0."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, not {temperature}")
