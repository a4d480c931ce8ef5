"""Named tensors in safetensors files, of which a process reads the part that it holds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def local_part(like: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and place, in the whole tensor, of what this process holds of one.

    Args:
        like: A tensor, or a DTensor sharded or replicated over any mesh; it may be on the device "meta".

    Returns:
        The shape, which may have no numbers, and the first index of each dimension. Of a plain tensor: all of it.

    Raises:
        ValueError: A DTensor that is a sum still to be taken, or whose part is not one block.
    """
    if not isinstance(like, DTensor):
        return tuple(like.shape), (0,) * like.dim()
    if not all(type(placement) in (Shard, Replicate) for placement in like.placements):
        raise ValueError(f"a tensor placed as {like.placements} cannot be read in slices")
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return tuple(shape), tuple(offset) if math.prod(shape) else (0,) * like.dim()


class TensorFiles:
    """The tensors in some safetensors files, read when they are asked for.

    Args:
        files: The files; a name is in one of them.

    Attributes:
        metadata: What the files say of themselves.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._where: dict[str, Any] = {}
        self.metadata: dict[str, str] = {}
        for file in files:
            opened = safe_open(file, framework="pt")  # maps the file; nothing is read yet
            self._where |= dict.fromkeys(opened.keys(), opened)
            self.metadata |= opened.metadata() or {}

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self._where[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in the file."""
        return _DTYPES[self._where[name].get_slice(name).get_dtype()]

    def whole(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """All of a tensor, on the CPU, in `dtype` (None: as in the file)."""
        mapped: torch.Tensor = self._where[name].get_tensor(name)  # the file itself, so it is copied
        return mapped.to(dtype or self.dtype(name), copy=True)

    def block(
        self, name: str, shape: tuple[int, ...], offset: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A block of a tensor, on the CPU; no more of the file than that is read, along the first dimension.

        Args:
            name: The tensor.
            shape: Of the block.
            offset: Its first index in each dimension.
            dtype: None: as in the file.

        Raises:
            ValueError: The block is not within the tensor.
        """
        own = self.shape(name)
        if len(own) != len(shape) or any(o + n > m for n, o, m in zip(shape, offset, own, strict=True)):
            raise ValueError(f"{name} has the shape {list(own)}, and {list(shape)} from {list(offset)} on is not in it")
        if not shape:
            return self.whole(name, dtype)
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype or self.dtype(name))
        index = tuple(slice(o, o + n) for n, o in zip(shape, offset, strict=True))
        mapped: torch.Tensor = self._where[name].get_slice(name)[index]
        return mapped.to(dtype or self.dtype(name), copy=True).contiguous()

    def local(self, name: str, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """This process's part of a tensor, on the CPU: what ``like.to_local()`` of a DTensor has room for.

        Args:
            name: The tensor.
            like: A DTensor of the whole shape, or a plain tensor, of which this process has all.
            dtype: None: as in the file.

        Raises:
            ValueError: The tensor in the file has another shape; a DTensor that is no block (:func:`local_part`).
        """
        if self.shape(name) != tuple(like.shape):
            raise ValueError(f"{name} has the shape {list(self.shape(name))}, and {list(like.shape)} is wanted")
        return self.block(name, *local_part(like), dtype)
