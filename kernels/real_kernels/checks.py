"""Argument checks shared by the public functions: wrong input is a ValueError that names the argument."""

from __future__ import annotations

from collections.abc import Callable

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


def check_bias(bias: torch.Tensor | None, weight: torch.Tensor) -> None:
    """A bias [V] of the weight's dtype and device."""
    if bias is None:
        return
    check_shape("bias", bias, (weight.shape[0],), weight.device)
    if bias.dtype != weight.dtype:
        raise ValueError(f"bias is {bias.dtype} and weight {weight.dtype}: cast one to the other's dtype first")


def check_index(name: str, index: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """An int64 tensor of one shape."""
    if index.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, not {index.dtype}")
    check_shape(name, index, shape, device)


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """A tensor's exact shape and device."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and hidden on {device}")


def check_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """A tensor's exact dtype."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}")


def check_score_ids(score_ids: torch.Tensor, device: torch.device) -> None:
    """A list of int64 token ids."""
    if score_ids.dim() != 1 or not score_ids.numel():
        raise ValueError(f"score_ids must be a list of token ids, not shape {tuple(score_ids.shape)}")
    check_index("score_ids", score_ids, tuple(score_ids.shape), device)


class ValueChecks:
    """Checks that must look at values: all of them wait for a GPU once, together, before anything is computed."""

    def __init__(self) -> None:
        self._fine: list[torch.Tensor] = []
        self._message: list[Callable[[], str]] = []

    def ids(self, name: str, ids: torch.Tensor, limit: int) -> None:
        """Every id in 0..limit-1."""
        self._fine.append(((ids >= 0) & (ids < limit)).all())
        self._message.append(lambda: f"{name} must lie in 0..{limit - 1}, and spans {int(ids.min())}..{int(ids.max())}")

    def different(self, name: str, ids: torch.Tensor) -> None:
        """No id twice."""
        self._fine.append((ids[:, None] == ids).sum() == ids.numel())
        self._message.append(lambda: f"{name} must be different tokens, and are {ids.tolist()}")

    def scale(self, values: torch.Tensor, labels: torch.Tensor) -> None:
        """Ascending scores, and labels between the first and the last."""
        self._fine.append((values[1:] > values[:-1]).all())
        self._message.append(lambda: f"score_values must be at least two ascending scores, not {values.tolist()}")
        bad = ~((labels >= values[0]) & (labels <= values[-1]))
        self._fine.append(~bad.any())
        self._message.append(lambda: f"labels {labels[bad].tolist()[:5]} are off the scale {values.tolist()}")

    def run(self) -> None:
        """Raise a ValueError for the first that fails."""
        for fine, message in zip(torch.stack(self._fine).tolist(), self._message, strict=True):
            if not fine:
                raise ValueError(message())
