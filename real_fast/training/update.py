"""The mechanics of an update: micro-batches, accumulated gradients, and a step that everybody takes or nobody."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from real_fast.batching.micro_batches import micro_batches
from real_fast.config import OptimConfig, TrainConfig
from real_fast.distributed.world import World
from real_fast.model.policy import Policy
from real_fast.runs.checkpoint import TrainState
from real_fast.runs.progress import show
from real_fast.training.idle import Idle
from real_fast.training.optim import clip_and_step
from real_fast.training.spikes import Spikes
from real_fast.training.timer import Timer
from real_fast.types import Batch, Group

logger = logging.getLogger(__name__)


class Updater:
    """Owns the optimiser and its schedule.

    Args:
        policy: What is trained.
        optimizer: Its optimiser.
        scheduler: The learning rate's schedule, in optimiser steps that were taken.
        optim: Of it, max_grad_norm.
        train: Of it, micro_batch_tokens, shared_prompt and give_up_after.
        pad_id: Token id for padding.
        world: The run's processes.
        timer: Times packing and the optimiser.
        state: Counts skipped steps, and updates that trained nothing.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        scheduler: LambdaLR,
        optim: OptimConfig,
        train: TrainConfig,
        pad_id: int,
        world: World,
        timer: Timer,
        state: TrainState,
    ) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.optim = optim
        self.train = train
        self.pad_id = pad_id
        self.world = world
        self.timer = timer
        self.state = state
        self._first: dict[str, Any] = {}
        self._batches = self._begun = 0
        self.idle = Idle(train.give_up_after, state)
        self.spikes = Spikes(optim.max_grad_norm)

    def micro_batches(self, groups: Sequence[Group]) -> list[Batch]:
        """This rank's part of an update's groups, in micro-batches on the policy's device; as many on every rank."""
        with self.timer("pack", within="update"):
            budget, shared, world = self.train.micro_batch_tokens, self.train.shared_prompt, self.world
            batches = micro_batches(groups, budget, self.pad_id, shared, world.rank, world.size)
        self._first = {}
        self._batches, self._begun = len(batches), 0
        self.idle.begin(any(r.has_score for g in groups for r in g.rollouts))
        logger.debug("%d groups in %d micro-batches", len(groups), len(batches))
        return [batch.to(self.policy.device) for batch in batches]

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch; sharded gradients would be reduced in here.

        From the first to the last, the policy computes with weights cast once.
        """
        self._begun = self._begun % self._batches + 1
        show(f"update: micro-batch {self._begun} of {self._batches}")
        try:
            self.policy.begin_step()
            yield
        except BaseException:  # no copy of the weights outlives an update that failed
            self.policy.end_step()
            raise
        if last:
            self.policy.end_step()

    def step(self) -> None:
        """Clip, step and go on in the schedule; where the gradient is not finite, skip both, and count it."""
        with self.timer("optimizer"):
            lr = float(self.scheduler.get_last_lr()[0])
            norm, stepped = clip_and_step(self.policy, self.optimizer, self.optim.max_grad_norm, self.world)
            if stepped:
                self.scheduler.step()
                self.spikes.see(norm)
        self.state.skipped_steps += not stepped
        self.idle.step(stepped)
        self._first = self._first or {"grad_norm": norm, "learning_rate": lr}

    def metrics(self) -> dict[str, Any]:
        """Gradient norm and learning rate of the update's first optimiser step, and steps skipped so far."""
        return {**self._first, "skipped_steps": self.state.skipped_steps}
