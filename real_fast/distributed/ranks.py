"""The processes that torchrun started, over torch.distributed."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, get_args

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from real_fast.distributed.launch import launched
from real_fast.distributed.world import ALONE, Purpose, World
from real_fast.errors import ON_ALL_RANKS, ConfigError, ElsewhereError, UserError

T = TypeVar("T")

# A rank waits for the slowest of an update's rollouts, or of an evaluation's: longer than an engine's own time-out.
_PATIENCE, _MARGIN = timedelta(hours=3), timedelta(minutes=10)
# Within an update, nobody waits long unless a rank is gone.
_STUCK = timedelta(minutes=15)


class Ranks:
    """A :class:`real_fast.distributed.world.World` of several processes; see :func:`joined`.

    Objects, counts and flags go over gloo, and so through the host's memory, whatever the device; they are pickled
    between the run's own processes. Weights and gradients go over NCCL on GPUs.

    Args:
        device: Where this process computes.
        replicas: Of the sharded model (HSDP): each is spread over size / replicas consecutive ranks.
        patience: How long a rank waits for another outside of an update.
    """

    def __init__(self, device: torch.device, replicas: int = 1, patience: timedelta = _PATIENCE) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.here = int(os.environ["LOCAL_WORLD_SIZE"])
        self.device = device
        self._control = dist.new_group(backend="gloo", timeout=patience)
        # Made now, since whoever asks for one may be alone: another rank may have failed just before.
        self._beside = {p: dist.new_group(backend="gloo", timeout=patience) for p in get_args(Purpose)}
        self.mesh = mesh_of(device.type, self.size, replicas)

    @property
    def is_main(self) -> bool:
        """Rank 0 is."""
        return self.rank == 0

    def all(self, flag: bool) -> bool:
        """Whether it is so everywhere."""
        return self._reduced(flag, dist.ReduceOp.MIN)

    def any(self, flag: bool) -> bool:
        """Whether it is so somewhere."""
        return self._reduced(flag, dist.ReduceOp.MAX)

    def _reduced(self, flag: bool, how: Any) -> bool:
        found = torch.tensor(int(flag))
        dist.all_reduce(found, how, group=self._control)
        return bool(found)

    def gather(self, value: T) -> list[T]:
        """Every process's value."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._control)
        return found

    def main(self, value: T) -> T:
        """Rank 0's value."""
        found = [value]
        dist.broadcast_object_list(found, src=0, group=self._control)
        return found[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error on one is raised on all: there as it is, elsewhere as :class:`ElsewhereError`."""
        raised: Exception | None = None
        try:
            yield
        except Exception as error:
            raised = error
        said = self.gather(None if raised is None else _said(raised))
        failed = [rank for rank, one in enumerate(said) if one]
        if raised is not None and self.rank == failed[0]:
            raised.add_note(ON_ALL_RANKS)
            raise raised
        if failed:
            raise ElsewhereError(f"rank {failed[0]} failed: {said[failed[0]]}") from raised

    def beside(self, purpose: Purpose) -> World:
        """The same ranks over a gloo group of its own."""
        other = copy.copy(self)
        other._control = self._beside[purpose]
        return other

    def add_up(self, tensors: list[torch.Tensor]) -> None:
        """Sums over all ranks, by one message for each dtype."""
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            some = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.flatten() for tensor in some])
            dist.all_reduce(flat)
            for tensor, part in zip(some, flat.split([tensor.numel() for tensor in some]), strict=True):
                tensor.copy_(part.view_as(tensor))


def mesh_of(device: str, size: int, replicas: int) -> DeviceMesh:
    """The ranks in a line, or (replicas, ranks of one): those of a replica are consecutive, a node's if it has as many.

    Raises:
        ConfigError: The ranks cannot be shared out evenly.
    """
    if size % replicas:
        raise ConfigError(f"train.replicas is {replicas}, and {size} ranks cannot be shared out among as many")
    if replicas == 1:
        return init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


@contextmanager
def joined(device: str, replicas: int = 1, timeout: float = _PATIENCE.total_seconds()) -> Iterator[World]:
    """The world of a command: alone, or the ranks of the torchrun that started it; their group ends with the ``with``.

    Where torch.distributed has been set up already, that group is taken, and left as it is.

    Args:
        device: ``train.device``.
        replicas: ``train.replicas``.
        timeout: ``rollout.timeout``.

    Raises:
        ConfigError: A launch that cannot work.
    """
    if launched() == 1:
        yield ALONE
        return
    own = not dist.is_initialized()
    place = _device(device)
    if own:
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=_STUCK)
    yield Ranks(place, replicas, timedelta(seconds=timeout) + _MARGIN)
    if own:  # not behind an error, where others may never come to their end
        dist.destroy_process_group()


def _device(wanted: str) -> torch.device:
    """This rank's device; of a GPU, it becomes torch's current one. Raises :class:`ConfigError`."""
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    here, local = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    if here > torch.cuda.device_count():
        raise ConfigError(
            f"torchrun started {here} ranks on this machine, and it has {torch.cuda.device_count()} GPUs that this "
            "process sees (CUDA_VISIBLE_DEVICES): give --nproc-per-node as many, or set train.device to cpu"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
