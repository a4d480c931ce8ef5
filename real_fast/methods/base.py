"""What a method is: which rows it takes, what it makes of them, and its loss. One file and one registry row each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from real_fast.config import Config
from real_fast.data.dataset import Dataset
from real_fast.distributed.world import ALONE, World
from real_fast.model.policy import Policy
from real_fast.prompt.guard import EncodeFeedback
from real_fast.rollout.engine import RolloutEngine
from real_fast.score.scale import ScoreScale
from real_fast.types import Batch, Group, JudgeRow


@dataclass(frozen=True)
class UpdateCounts:
    """Counts over the whole update, so that a micro-batch's loss does not depend on how groups are packed.

    Attributes:
        rollouts: Rollouts (or given answers) that have a score, 1 at least.
        tokens: Their sampled tokens (or given ones, the end of an answer included), 1 at least.
    """

    rollouts: int
    tokens: int

    @classmethod
    def of(cls, groups: Sequence[Group]) -> UpdateCounts:
        """Count rollouts with a score and their sampled tokens, in all groups of an update, whoever trains on them."""
        valid = [r for g in groups for r in g.rollouts if r.has_score]
        return cls(max(len(valid), 1), max(sum(len(r.targets) for r in valid), 1))


@dataclass
class LossOutput:
    """What every method's loss returns; all but `loss` is detached.

    Attributes:
        loss: Scalar to call ``backward()`` on.
        score_logprobs: [M, K] log-probabilities of the score tokens (temperature 1, full softmax).
        expected_score: [M] RAIL predictions.
        logprobs: [N] log-probabilities of the sampled (or given) tokens; NaN where `computed` is False.
        computed: [N] bool, rows that went through the head.
        parts: The loss's parts by name, scalars whose sum over micro-batches is the update's.
        rewards: [M]; None for a method without.
        advantages: [M]; None for a method without.
        action_logprob: [M] log-probability of each drawn score; None for a method that draws none.
        kl: [n] k3 estimates for the sampled tokens of valid rollouts, in nats; None where it was not measured.
        ratio: [n] probability over that of the first iteration, of the tokens that were computed; None in the first.
        clipped: [n] bool, where the clip took the gradient.
        weights: [M] importance weights; None where they are 1.
    """

    loss: torch.Tensor
    score_logprobs: torch.Tensor
    expected_score: torch.Tensor
    logprobs: torch.Tensor
    computed: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    rewards: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    action_logprob: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    ratio: torch.Tensor | None = None
    clipped: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    @property
    def off_scale_mass(self) -> torch.Tensor:
        """[M] probability outside the score tokens."""
        return 1 - self.score_logprobs.exp().sum(1)


Loss = Callable[[torch.Tensor, torch.Tensor, Batch], LossOutput]
"""(hidden states [B * T, D], lm_head's weight [V, D], micro-batch) to the loss; called inside ``Policy.forward``."""


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """What losses compute in: float64 for float64 hidden states, float32 for all others."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Trained:
    """What a finished run hands to the next stage of its method.

    Attributes:
        engine: A rollout engine with the trained weights; the stage that gets it closes it.
        data: The run's rows.
        scale: The score scale.
        folder: The run's folder.
    """

    engine: RolloutEngine
    data: Dataset
    scale: ScoreScale
    folder: Path


Stages = Generator[Config, Trained | None, None]


class Method(ABC):
    """A training method.

    The trainer calls, in this order: :meth:`stages` and :meth:`check` before anything is loaded, :meth:`use_rows` on
    the data, :meth:`begin` (or :meth:`resume`) on the policy that the phase starts with, then for every update
    :meth:`groups`, :meth:`prepare` and, for each micro-batch of each iteration, :meth:`loss`.

    Args:
        config: The run's settings.
        encode_feedback: Gives the token ids of feedback texts: :meth:`real_fast.prompt.guard.Guard.encode_feedback`.
        scale: The score scale.
    """

    name: str
    """What ``method`` in a config says."""
    uses_rollouts: bool
    """Whether it trains on sampled feedback (and has rewards), or on feedback that comes with the data."""

    def __init__(self, config: Config, encode_feedback: EncodeFeedback, scale: ScoreScale) -> None:
        self.config = config
        self.encode_feedback = encode_feedback
        self.scale = scale

    @classmethod
    @abstractmethod
    def prompts_per_step(cls, config: Config) -> tuple[str, int]:
        """Rows per update, with the name of the setting that says so."""

    @classmethod  # noqa: B027
    def check(cls, config: Config) -> None:
        """Raise :class:`ConfigError` for settings that the method cannot work with."""

    @classmethod
    def stages(cls, config: Config, world: World = ALONE) -> Stages:
        """The runs that the method consists of, one config after another; each is answered by what it left.

        All ranks go through them, and the main one writes what lies between them.
        """
        yield config

    @property
    def iterations(self) -> int:
        """Optimiser steps on one batch of groups."""
        return 1

    @property
    def recomputes(self) -> bool:
        """Whether the head must recompute logits in the backward pass (8 N D V FLOPs instead of 6)."""
        return False

    @property
    def keeps_ref_policy(self) -> bool:
        """Whether a frozen copy of the policy is needed, for the KL divergence."""
        return False

    def use_rows(self, data: Dataset) -> None:  # noqa: B027
        """Keep the training rows that the method can use; the others go to ``data.rejected`` with the reason.

        Raises:
            DataError: Fewer rows are left than one update needs.
        """

    def begin(self, policy: Policy, run: Path, world: World = ALONE) -> None:  # noqa: B027
        """The policy is what the phase starts with; what has to be remembered of it is written into the run's folder.

        All ranks call this, and the main one writes.

        Raises:
            CheckpointError: It cannot be written.
        """

    def resume(self, policy: Policy, run: Path, world: World = ALONE) -> None:  # noqa: B027
        """As :meth:`begin`, with what it wrote; `policy` has the weights of a checkpoint.

        Raises:
            CheckpointError: It is needed and not there.
        """

    @abstractmethod
    def groups(
        self, rows: Sequence[JudgeRow], rows_seen: int, step: int, engine: RolloutEngine, compare: bool = False
    ) -> list[Group]:
        """The groups of an update: a function of the weights, the seed and the two places alone.

        Args:
            rows: The update's rows.
            rows_seen: Training rows used up before these.
            step: Updates done before this one.
            engine: Samples, for a method that uses rollouts.
            compare: The engine's score log-probabilities will be compared with the trainer's.
        """

    def prepares(self, step: int) -> bool:
        """Whether the update behind `step` others needs :meth:`prepare`."""
        return False

    def prepare(self, batches: Sequence[Batch]) -> None:  # noqa: B027
        """What an update needs before its forward passes, such as a reference's log-probabilities in the batches.

        Args:
            batches: The update's micro-batches.
        """

    @abstractmethod
    def loss(self, counts: UpdateCounts, old: LossOutput | None = None, compare: bool = False) -> Loss:
        """The loss of one micro-batch.

        Args:
            counts: Counts over the update.
            old: What the first iteration returned for this micro-batch; None in the first.
            compare: Compute the log-probability of tokens with coefficient 0 too, to compare engine and trainer.
        """
