"""Seconds of one update by phase, measured from outside through hooks: nothing is built into the trainer for it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from benchmarks.machine import synchronize
from real_fast.training.optim import clip_and_step


class Phases:
    """A stopwatch with named phases; on CUDA it waits for the device at every boundary."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time inside to a phase."""
        synchronize()
        started = time.perf_counter()
        yield
        synchronize()
        self.seconds[name] += time.perf_counter() - started

    @contextmanager
    def body(self, module: nn.Module) -> Iterator[None]:
        """Add the time of the body's forward passes inside to ``body forward``, and take it from ``head``."""
        started = 0.0

        def before(*_: object) -> None:
            nonlocal started
            synchronize()
            started = time.perf_counter()

        def after(*_: object) -> None:
            synchronize()
            seconds = time.perf_counter() - started
            self.seconds["body forward"] += seconds
            self.seconds["head"] -= seconds

        handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def optimizer_for(module: nn.Module) -> torch.optim.Optimizer:
    """The same optimiser for everyone."""
    return torch.optim.AdamW(module.parameters(), lr=1e-9, fused=True)


def optimizer_step(module: nn.Module, optimizer: torch.optim.Optimizer | None, phases: Phases) -> None:
    """The trainer's own clipping and step, where there is an optimiser."""
    if optimizer is not None:
        with phases("optimizer"):
            clip_and_step(module, optimizer, 1.0)
