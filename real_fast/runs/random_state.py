"""The ranks' random states as named tensors: ``rng:cpu`` and ``rng:cuda`` of rank 0, ``rng:cpu:1`` of rank 1."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from real_fast.distributed.slices import TensorFiles
from real_fast.distributed.world import World


def tensors_of(world: World) -> Iterator[tuple[str, torch.Tensor]]:
    """Every rank's states, on every rank; all of them call this."""
    own = {"rng:cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["rng:cuda"] = torch.cuda.get_rng_state()
    for rank, states in enumerate(world.gather(own)):
        yield from ((_name(kind, rank), state) for kind, state in states.items())


def restore(files: TensorFiles, world: World) -> None:
    """Set this rank's states; a rank that the checkpoint does not know starts from a seed drawn from rank 0's."""
    names = files.names
    if _name("rng:cpu", world.rank) not in names:
        drawn = torch.Generator()
        drawn.set_state(files.whole("rng:cpu"))
        torch.manual_seed(int(torch.randint(2**62, (world.rank + 1,), generator=drawn)[-1]))
        return
    torch.set_rng_state(files.whole(_name("rng:cpu", world.rank)))
    if (on_gpu := _name("rng:cuda", world.rank)) in names and torch.cuda.is_available():
        torch.cuda.set_rng_state(files.whole(on_gpu))


def _name(kind: str, rank: int) -> str:
    return f"{kind}:{rank}" if rank else kind
