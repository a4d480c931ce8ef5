"""Where an update's groups come from, and who has to know when the weights have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import TracebackType

from real_fast.config import RolloutConfig
from real_fast.data.sampler import PromptSampler
from real_fast.errors import ConfigError
from real_fast.methods.base import Method
from real_fast.model.policy import Policy
from real_fast.rollout.agreement import EngineGap
from real_fast.rollout.checked import give_weights
from real_fast.rollout.engine import RolloutEngine
from real_fast.runs.checkpoint import TrainState
from real_fast.training.ahead import Ahead
from real_fast.training.peak_memory import PeakMemory
from real_fast.training.timer import Timer
from real_fast.types import Group, JudgeRow

# After a wake, engine and trainer are compared in so many updates, whatever rollout.check_every says.
FIRST_WAKES = 5


class GroupSource:
    """Groups of one update after another.

    The engine sleeps, where it can, while the trainer trains. It gets the weights when it next samples: behind its
    wake, since a wake brings back the weights of before the sleep.

    After :meth:`sample_ahead` it samples meanwhile: an update's groups are taken, the engine gets the weights as they
    are and begins with the next update's, whose rollouts thus come from weights one update older than those that they
    train. The first groups, those behind a checkpoint that kept none, and those by which engine and trainer are
    compared are sampled from the weights as they are.

    Args:
        method: Makes groups of rows.
        sampler: The order of the training rows.
        engine: Samples feedback; it has the policy's weights as they are now.
        timer: Times rollouts and synchronisation.
        memory: Counts the memory of rollouts and update.
        check_every: ``rollout.check_every``.

    Attributes:
        failed: Called with what goes wrong with the engine, or stops the run beside it, before that is raised. Weights,
            moments and log are then those of the updates that are done.
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
        self.ahead: Ahead | None = None
        self.older = False
        self.steps = 0
        self.failed: Callable[[Exception], None] = lambda _: None

    def __enter__(self) -> GroupSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.ahead is not None:
            self.ahead.close(at_once=kind is not None and not issubclass(kind, Exception))

    def sample_ahead(self, steps: int, resume_from: Path | None) -> None:
        """Sample the groups of each update while the one before it trains.

        Args:
            steps: Updates of the run: behind the last, nothing is sampled.
            resume_from: A checkpoint, which may have kept the groups that come next.

        Raises:
            ConfigError: The engine cannot sample while the trainer trains.
            CheckpointError: What the checkpoint kept cannot be read.
        """
        if not self.engine.beside_training:
            raise ConfigError(
                f"rollout.ahead is 1, and the engine {self.engine.name} samples in the trainer's process, in turn with "
                "it: set rollout.engine to vllm-server, or rollout.ahead to 0"
            )
        self.ahead, self.steps = Ahead(), steps
        if resume_from is not None:
            self.ahead.restore(resume_from)

    def next(self, state: TrainState, policy: Policy) -> list[Group]:
        """The groups of the update that follows `state`: those sampled ahead, or sampled from the policy as it is."""
        with self._told():
            groups = self._taken(state.step)
            self.older = groups is not None
            if groups is None:
                groups = self._sampled(state, policy)
            self._launch(state, len(groups), policy)
        return groups

    def check(self, gap: EngineGap, config: RolloutConfig, step: int) -> None:
        """Raise :class:`EngineMismatchError` where engine and trainer disagree, before an update's first step."""
        with self._told():
            gap.raise_if_above(config, step, self.engine.dtype)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failed(error)
            raise

    def _taken(self, step: int) -> list[Group] | None:
        """What was sampled ahead; None where nothing was, or where engine and trainer are to be compared by it."""
        if self.ahead is None:
            return None
        with self.timer("wait"):
            taken = self.ahead.take(step)
        if taken is None or self._due(step):
            return None
        self.memory.mark("")
        self.timer.add("rollout", taken.seconds)
        return taken.groups

    def _launch(self, state: TrainState, rows: int, policy: Policy) -> None:
        """Begin with the groups of the update behind the one that follows `state` and has so many rows."""
        step = state.step + 1
        if self.ahead is None or step >= self.steps or self._due(step):
            return
        self.catch_up(policy)
        seen = state.rows_seen + rows
        self.ahead.launch(step, partial(self.method.groups, self.sampler.batch(seen), seen, step, self.engine))

    def _sampled(self, state: TrainState, policy: Policy) -> list[Group]:
        rows = self.sampler.batch(state.rows_seen)
        with self._awake(policy) if self.method.uses_rollouts else nullcontext():
            self.memory.mark("")
            with self.timer("rollout"):
                compare = self.compares(state.step)
                groups = self.method.groups(rows, state.rows_seen, state.step, self.engine, compare)
            self.memory.mark("rollout" if self.method.uses_rollouts else "")
        return groups

    @contextmanager
    def awake(self, policy: Policy) -> Iterator[None]:
        """Sampling inside, between two updates: the engine has the weights as they are, and rests behind it."""
        with self._told(), self._awake(policy):
            yield

    @contextmanager
    def _awake(self, policy: Policy) -> Iterator[None]:
        if self.ahead is not None:
            with self.timer("wait"):
                self.ahead.join()  # the weights stay as they are while something is sampled from them
        self.catch_up(policy)
        yield
        self.rest()

    def rest(self) -> None:
        """Training follows: an engine that can sleep gives its memory back, and needs a sync when it wakes."""
        if self.ahead is None and not self.asleep and self.engine.sleep():
            self.asleep = self.stale = True

    def publish(self) -> None:
        """The weights have changed."""
        self.memory.mark("update")
        self.stale = True

    def catch_up(self, policy: Policy) -> None:
        """Wake the engine and hand it the weights, if it does not have them."""
        if self.stale:
            with self.timer("sync"):
                give_weights(self.engine, policy.model)
            self.wakes += self.asleep
            self.stale = self.asleep = False

    def compares(self, step: int) -> bool:
        """Whether engine and trainer are compared in the update behind `step` others: every so many, 0 for never.

        Beside those, after each of the first wakes, where a wake that lost weights would show. Never by rollouts that
        were sampled ahead: the trainer is one update newer, and the difference would be the update's. Where a
        comparison is due, nothing is sampled ahead, and the groups come from the weights as they are.
        """
        return self._due(step) and not self.older

    def _due(self, step: int) -> bool:
        every, woken = self.check_every, 0 < self.wakes <= FIRST_WAKES
        return self.method.uses_rollouts and every > 0 and (step % every == 0 or woken)

    def files(self) -> dict[str, str]:
        """What a checkpoint keeps of what was sampled ahead, by the file's name; waits for it."""
        if self.ahead is None:
            return {}
        with self.timer("wait"):
            return self.ahead.files()

    def metrics(self) -> dict[str, float]:
        """Memory of the update at hand."""
        return self.memory.metrics(self.engine.held_bytes, self.asleep)
