"""What a folder has of tensors: shared out over the ranks, collected into files of 5 GB.

Every rank sees the name and the size of every tensor, in the same order, and so knows without a word which rank keeps
which, and what every rank's files are called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

FILE_BYTES = 5 * 10**9  # files are read, written and checked side by side
Tensors = dict[str, torch.Tensor]


@dataclass
class Part:
    """Tensors that belong together, such as a model's.

    Attributes:
        stem: Of the files' names: "model" is one file model.safetensors, or several model-00001-of-00003.safetensors.
        tensors: Names and tensors, whole on every rank (all of them go through these together). Whoever makes them one
            at a time holds none of them meanwhile.
        nbytes: What this rank will hold of them, about.
        index: Whether several files come with an index, as Hugging Face's do.
        one_file: All in one file, which the main process writes.
        convert: From a tensor as the model has it to those of the file.
        all_at_once: `convert` takes all tensors together, and not one after the other; the main process does.
        metadata: Goes into every file.
    """

    stem: str
    tensors: Iterable[tuple[str, torch.Tensor]]
    nbytes: int
    index: bool = False
    one_file: bool = False
    convert: Callable[[Tensors], Tensors] | None = None
    all_at_once: bool = False
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass
class Contents:
    """What goes into a folder.

    Attributes:
        small: Writes everything but tensors into a folder; the main process calls it.
        parts: The tensors.
    """

    small: Callable[[Path], None]
    parts: Sequence[Part]


@dataclass
class TensorFile:
    """A file of one rank: the `number`-th of a part's that it writes."""

    part: Part
    number: int
    tensors: Tensors


class Shares:
    """Which rank writes which tensor: the one that has least so far, so that none has more than its share by one."""

    def __init__(self, size: int) -> None:
        self._bytes = [0] * size

    def next(self, nbytes: int) -> int:
        """The rank of the next tensor."""
        rank = min(range(len(self._bytes)), key=self._bytes.__getitem__)
        return self.give(rank, nbytes)

    def give(self, rank: int, nbytes: int) -> int:
        """The rank as it is, which has so many bytes more."""
        self._bytes[rank] += nbytes
        return rank


def files_of(part: Part, shares: Shares, rank: int, size: int, copy: bool) -> Generator[TensorFile, None, list[int]]:
    """This rank's files, each when it is full, as soon as all ranks have got that far.

    Args:
        part: The tensors.
        shares: What the ranks have so far; goes on.
        rank: This process.
        size: Of all.
        copy: Whether tensors in the host's memory are copied, since they change while they are written.

    Returns:
        The number of files of each rank.
    """
    counts, filled = [0] * size, [0] * size
    mine: Tensors = {}
    for name, tensor in part.tensors:
        nbytes = tensor.numel() * tensor.element_size()
        together = part.one_file or part.all_at_once
        owner = shares.give(0, nbytes) if together else shares.next(nbytes)
        if filled[owner] and filled[owner] + nbytes > FILE_BYTES and not together:
            filled[owner] = 0
            if owner == rank:
                yield TensorFile(part, counts[rank] - 1, mine)
                mine = {}
        if not filled[owner]:
            counts[owner] += 1
        filled[owner] += max(nbytes, 1)
        if owner == rank:
            kept = {name: on_host(tensor, copy)}
            mine |= part.convert(kept) if part.convert and not part.all_at_once else kept
            del kept
        del tensor  # before the next one is made
    if part.convert and part.all_at_once:
        mine = part.convert(mine)
    if mine:
        yield TensorFile(part, counts[rank] - 1, mine)
    return counts


def on_host(tensor: torch.Tensor, copy: bool) -> torch.Tensor:
    """A tensor in the host's memory and in one piece; a copy of its own where `copy` says so."""
    found = tensor.detach()
    found = found.cpu() if found.device.type != "cpu" else found.clone() if copy else found
    return found.contiguous()


def file_name(stem: str, number: int, count: int) -> str:
    """Hugging Face's name of a file, the `number`-th (from 0) of `count`."""
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"


def files_in(folder: Path, stem: str) -> list[Path]:
    """The files of a part in a folder, by their names."""
    return sorted([*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-[0-9]*-of-[0-9]*.safetensors")])


def nbytes_of(tensors: Iterable[torch.Tensor], dtype: torch.dtype | None = None) -> int:
    """Bytes of what this process has of some tensors, where floating-point ones are cast to `dtype`."""
    from torch.distributed.tensor import DTensor

    def size(tensor: torch.Tensor) -> int:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        width = dtype.itemsize if dtype is not None and local.is_floating_point() else local.element_size()
        return math.prod(local.shape) * width

    return sum(map(size, tensors))
