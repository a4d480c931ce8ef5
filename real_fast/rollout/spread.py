"""Rollouts sampled by all ranks, a part of the prompts each, and known to all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from real_fast.distributed.world import World
from real_fast.model.lora import merged_tensors
from real_fast.rollout.engine import RolloutEngine
from real_fast.types import Rollout, SamplingParams


@contextmanager
def _together(
    world: World, named_tensors: Iterable[tuple[str, torch.Tensor]], telling: bool = True
) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
    """A sync by all ranks: one whose engine fails still takes its part in making the rest whole, and then tells."""
    tensors = iter(named_tensors)
    # Ranks of one engine wait for each other within it, so an error there cannot wait to be told.
    with world.together() if telling else nullcontext():
        try:
            yield tensors
        finally:
            for _ in tensors if telling else ():
                pass


class SpreadEngine:
    """An engine on every rank (or every few, which compute one model together), behind the calls of one.

    Every call is collective. A sample depends on its prompt's place among all prompts, not on who samples it. An engine
    that samples beside training may be called in a thread, the same one on every rank: its samples are then exchanged
    by a channel of their own.

    Args:
        engine: This rank's.
        world: The ranks.
        together: So many consecutive ranks share an engine (tensor parallelism), and sample the same prompts.
    """

    def __init__(self, engine: RolloutEngine, world: World, together: int = 1) -> None:
        self.engine, self.world, self.together = engine, world.beside("sampling"), together
        self.name, self.dtype, self.takes = engine.name, engine.dtype, engine.takes
        self.vocabulary = engine.vocabulary
        self.beside_training = engine.beside_training

    @property
    def held_bytes(self) -> int:
        """Of this rank's engine."""
        return self.engine.held_bytes

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Rollout]]:
        """Sample for every prompt; every rank gets all rollouts, in the order of the prompts."""
        engines = self.world.size // self.together
        mine = range(self.world.rank // self.together, len(prompts), engines)
        found: list[list[Rollout]] = []
        # Ranks of one engine wait for each other within it, so an error there cannot wait to be told.
        with self.world.together() if self.together == 1 else nullcontext():
            if mine:
                places = tuple(sampling.place(place) for place in mine)
                found = self.engine.generate([prompts[place] for place in mine], replace(sampling, places=places))
        first = self.world.rank % self.together == 0  # the others of an engine have sampled the same
        parts = self.world.gather(found if first else [])[:: self.together]
        return [parts[place % engines][place // engines] for place in range(len(prompts))]

    def sync(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Hand the weights, which are whole on every rank, to each engine."""
        with _together(self.world, named_tensors, self.together == 1) as tensors:
            self.engine.sync(tensors)

    def sync_adapters(self, model: Any) -> None:
        """Hand the adapters, which every rank has, to each engine."""
        self.engine.sync_adapters(model)

    def sleep(self) -> bool:
        """All engines are alike, so all of them sleep, or none."""
        return self.engine.sleep()

    def close(self) -> None:
        """Free what this rank's engine holds."""
        self.engine.close()


class MainEngine:
    """An engine that the main rank alone has, such as a server's; the others get what it samples. Calls are collective.

    Args:
        engine: On the main rank; None on the others.
        world: The ranks.
        name: Of the engine.
        dtype: What it computes in and keeps weights in.
    """

    beside_training = True
    held_bytes = 0

    def __init__(self, engine: RolloutEngine | None, world: World, name: str, dtype: torch.dtype) -> None:
        self.engine, self.world, self.name = engine, world.beside("sampling"), name
        self.dtype = self.takes = dtype
        self.vocabulary: int = self.world.main(engine.vocabulary if engine is not None else 0)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Rollout]]:
        """Sample for every prompt; every rank gets all rollouts."""
        found: list[list[Rollout]] = []
        with self.world.together():
            if self.engine is not None:
                found = self.engine.generate(prompts, sampling)
        return self.world.main(found)

    def sync(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Hand over the weights, which all ranks make whole together."""
        with _together(self.world, named_tensors) as tensors:
            if self.engine is not None:
                self.engine.sync(tensors)

    def sync_adapters(self, model: Any) -> None:
        """Hand over the weights that a model's adapters make."""
        self.sync(merged_tensors(model))

    def sleep(self) -> bool:
        """Nothing: what it holds is elsewhere."""
        return False

    def close(self) -> None:
        """Close connections."""
        if self.engine is not None:
            self.engine.close()
