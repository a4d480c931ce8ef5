"""REAL: the reward of the expected score, followed through the sampled feedback and through the score itself."""

from __future__ import annotations

from dataclasses import replace

import torch

from real_fast.config import Config
from real_fast.errors import ConfigError
from real_fast.methods.base import Loss, LossOutput, UpdateCounts, compute_dtype
from real_fast.methods.policy_gradient import PolicyGradient, Scored
from real_fast.prompt.guard import EncodeFeedback
from real_fast.score.scale import ScoreScale
from real_fast.types import Batch
from real_kernels import RealObjective, RewardParts, real_loss, reward_parts


class Real(PolicyGradient):
    """REAL (arXiv 2603.17145); see :func:`real_kernels.real_loss` for the loss."""

    name = "real"

    def __init__(self, config: Config, encode_feedback: EncodeFeedback, scale: ScoreScale) -> None:
        super().__init__(config, encode_feedback, scale)
        o = config.objective
        self.explores = o.exploration
        self.reads_engine_scores = o.reward_from == "engine"
        self.reward = "authors" if o.reward == "reference" else o.reward  # its earlier name
        self.objective = RealObjective(
            reward=self.reward,
            lam=o.lam,
            beta=o.beta,
            baseline=o.baseline,
            normalize_std=o.normalize_std,
            advantage_clip=o.advantage_clip,
            loss_norm=o.loss_norm,
            renormalize=o.renormalize,
        )

    @classmethod
    def check(cls, config: Config) -> None:
        """One of the two gradients must be left."""
        super().check(config)
        if not config.objective.exploration and config.objective.beta == 0:
            raise ConfigError("objective.exploration is false and objective.beta is 0: nothing is left to train")

    def score(self, logp: torch.Tensor, batch: Batch) -> Scored:
        """Rewards from this pass's score distribution or, with ``reward_from: engine``, from the engine's."""
        own = self._parts(logp, batch)
        source = own
        if (engine := self._engine_score_logprobs(batch, logp.dtype)) is not None:
            source = self._parts(engine, batch)
        advantages = torch.zeros_like(source.reward.detach())
        for term, weight in zip(source.terms, source.weights, strict=True):
            advantages = advantages + weight * self.advantages(term, batch)
        return Scored(source.reward.detach(), advantages.detach(), reward_gradient=own.refinement)

    def fused(self, counts: UpdateCounts, compare: bool) -> Loss:
        """All of it in one operator: score rows first, their rewards give the feedback rows' coefficients."""

        def loss(hidden: torch.Tensor, weight: torch.Tensor, batch: Batch) -> LossOutput:
            dtype = compute_dtype(hidden)
            n = len(batch.targets) if self.explores else 0  # refinement alone has no use for the feedback's rows
            out = real_loss(
                hidden[batch.rows[:n]],
                weight,
                batch.targets[:n],
                batch.rollout[:n],
                hidden[batch.score_rows],
                self.scale.ids_tensor(hidden.device),
                self.scale.values_tensor(hidden.device).to(dtype),
                batch.labels.to(dtype),
                batch.group,
                rollout_valid=batch.rollout_valid,
                engine_score_logprobs=self._engine_score_logprobs(batch, dtype),
                num_rollouts=counts.rollouts,
                num_tokens=counts.tokens,
                skip_zero_rows=not compare,
                objective=self.objective,
                head=replace(self.head, validate=not hidden.is_cuda, unit_gradient=hidden.is_cuda),
            )
            missing = len(batch.targets) - n
            return LossOutput(
                out.loss,
                out.score_logprobs,
                out.expected_score,
                torch.cat([out.logprobs, out.logprobs.new_full((missing,), float("nan"))]),
                torch.cat([out.computed, out.computed.new_zeros(missing)]),
                {"exploration": out.exploration_loss, "refinement": out.refinement_loss},
                out.rewards,
                out.advantages,
            )

        return loss

    def _engine_score_logprobs(self, batch: Batch, dtype: torch.dtype) -> torch.Tensor | None:
        """[M, K] the engine's score log-probabilities, where advantages come from them and it gave any."""
        from_engine = self.reads_engine_scores and batch.engine_score_logprobs.shape[1]
        return batch.engine_score_logprobs.to(dtype) if from_engine else None

    def _parts(self, logp: torch.Tensor, batch: Batch) -> RewardParts:
        return reward_parts(
            logp,
            self.values(logp),
            batch.labels.to(logp.dtype),
            reward=self.reward,
            lam=self.options.lam,
            renormalize=self.options.renormalize,
            validate=not logp.is_cuda,
        )
