"""Where an update's groups come from, and who has to know when the weights have changed."""

from __future__ import annotations

from real_fast.data.sampler import PromptSampler
from real_fast.methods.base import Method
from real_fast.model.policy import Policy
from real_fast.rollout.engine import RolloutEngine
from real_fast.runs.checkpoint import TrainState
from real_fast.training.timer import Timer
from real_fast.types import Group, JudgeRow


class GroupSource:
    """Groups of one update after another.

    Args:
        method: Makes groups of rows.
        sampler: The order of the training rows.
        engine: Samples feedback; it has the policy's weights as they are now.
        timer: Times rollouts and synchronisation.
    """

    def __init__(self, method: Method, sampler: PromptSampler[JudgeRow], engine: RolloutEngine, timer: Timer) -> None:
        self.method = method
        self.sampler = sampler
        self.engine = engine
        self.timer = timer
        self.stale = False

    def next(self, state: TrainState) -> list[Group]:
        """The groups of the update that follows `state`."""
        rows = self.sampler.batch(state.rows_seen)
        with self.timer("rollout"):
            return self.method.groups(rows, state.rows_seen, state.step, self.engine)

    def publish(self, policy: Policy) -> None:
        """The weights have changed: hand them to the engine, now where the next update samples with it."""
        self.stale = True
        if self.method.uses_rollouts:
            self.catch_up(policy)

    def catch_up(self, policy: Policy) -> None:
        """Hand the weights to the engine, if it does not have them."""
        if self.stale:
            with self.timer("sync"):
                self.engine.sync(policy.named_tensors())
            self.stale = False
