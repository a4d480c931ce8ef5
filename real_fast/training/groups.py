"""Where an update's groups come from, and who has to know when the weights have changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from real_fast.data.sampler import PromptSampler
from real_fast.methods.base import Method
from real_fast.model.policy import Policy
from real_fast.rollout.engine import RolloutEngine, publish
from real_fast.runs.checkpoint import TrainState
from real_fast.training.peak_memory import PeakMemory
from real_fast.training.timer import Timer
from real_fast.types import Group, JudgeRow

# After a wake, engine and trainer are compared in so many updates, whatever rollout.check_every says.
FIRST_WAKES = 5


class GroupSource:
    """Groups of one update after another.

    The engine sleeps, where it can, while the trainer trains. It gets the weights when it next samples: behind its
    wake, since a wake brings back the weights of before the sleep.

    Args:
        method: Makes groups of rows.
        sampler: The order of the training rows.
        engine: Samples feedback; it has the policy's weights as they are now.
        timer: Times rollouts and synchronisation.
        memory: Counts the memory of rollouts and update.
        check_every: ``rollout.check_every``.
    """

    def __init__(
        self,
        method: Method,
        sampler: PromptSampler[JudgeRow],
        engine: RolloutEngine,
        timer: Timer,
        memory: PeakMemory,
        check_every: int,
    ) -> None:
        self.method = method
        self.sampler = sampler
        self.engine = engine
        self.timer = timer
        self.memory = memory
        self.check_every = check_every
        self.stale = False
        self.asleep = False
        self.wakes = 0

    def next(self, state: TrainState, policy: Policy) -> list[Group]:
        """The groups of the update that follows `state`, sampled from the policy as it is."""
        rows = self.sampler.batch(state.rows_seen)
        with self.awake(policy) if self.method.uses_rollouts else nullcontext():
            self.memory.mark("")
            with self.timer("rollout"):
                compare = self.compares(state.step)
                groups = self.method.groups(rows, state.rows_seen, state.step, self.engine, compare)
            self.memory.mark("rollout" if self.method.uses_rollouts else "")
        return groups

    @contextmanager
    def awake(self, policy: Policy) -> Iterator[None]:
        """Sampling inside: the engine has the weights as they are, and rests behind it."""
        self.catch_up(policy)
        yield
        self.rest()

    def rest(self) -> None:
        """Training follows: an engine that can sleep gives its memory back, and needs a sync when it wakes."""
        if not self.asleep and self.engine.sleep():
            self.asleep = self.stale = True

    def publish(self) -> None:
        """The weights have changed."""
        self.memory.mark("update")
        self.stale = True

    def catch_up(self, policy: Policy) -> None:
        """Wake the engine and hand it the weights, if it does not have them."""
        if self.stale:
            with self.timer("sync"):
                publish(self.engine, policy.model)
            self.wakes += self.asleep
            self.stale = self.asleep = False

    def compares(self, step: int) -> bool:
        """Whether engine and trainer are compared in the update behind `step` others: every so many, 0 for never.

        Beside those, after each of the first wakes, where a wake that lost weights would show.
        """
        every, woken = self.check_every, 0 < self.wakes <= FIRST_WAKES
        return self.method.uses_rollouts and every > 0 and (step % every == 0 or woken)

    def metrics(self) -> dict[str, float]:
        """Memory of the update at hand."""
        return self.memory.metrics(self.engine.held_bytes, self.asleep)
