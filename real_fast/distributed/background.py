"""Agreement between the ranks' background threads, while their main threads train."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from real_fast.distributed.world import World

# The slowest rank's disk may take this much longer than the fastest's.
_PATIENCE = timedelta(hours=1)


def background_gather(world: World) -> Callable[[Any], list[Any]]:
    """``World.gather`` for one thread beside the main one, over a gloo group of its own.

    On a group that the main threads use, the two threads' messages could meet those of other ranks in another order.

    Args:
        world: All its ranks call this, on their main threads.

    Returns:
        A function of a value that gives every rank's value, in the order of their ranks.
    """
    if world.size == 1:
        return lambda value: [value]
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def gather(value: Any) -> list[Any]:
        found: list[Any] = [None] * world.size
        dist.all_gather_object(found, value, group=group)
        return found

    return gather
