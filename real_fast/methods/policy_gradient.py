"""What REAL and the binary reward have in common: advantages, KL, clipped ratio, weights, and the way through the head.

A subclass says how the score rows become rewards (:meth:`PolicyGradient.score`). Where a token's coefficient does not
depend on its own log-probability, the head takes the gradient in the forward pass (6 N D V FLOPs). With a KL term,
several optimiser steps on the same rollouts, or rollouts of older weights it does, and the head recomputes (8 N D V),
with plain autograd on top.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from real_fast.config import Config
from real_fast.distributed.world import ALONE, World
from real_fast.errors import CheckpointError, ConfigError, ElsewhereError
from real_fast.methods.base import Loss, LossOutput, Method, UpdateCounts
from real_fast.methods.importance import sequence_weights
from real_fast.model.lora import is_adapted
from real_fast.model.policy import Policy
from real_fast.model.ref_policy import RefAdapters, RefPolicy
from real_fast.prompt.guard import EncodeFeedback
from real_fast.rollout.checked import sample
from real_fast.rollout.engine import RolloutEngine
from real_fast.score.scale import ScoreScale
from real_fast.types import Batch, Group, JudgeRow, SamplingParams
from real_fast.utils.seeds import step_seed
from real_kernels import HeadOptions, expected_score, group_advantages, linear_logprob, score_logprobs, weighted_logprob

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """What the score rows of a micro-batch give.

    Attributes:
        rewards: [M] detached.
        advantages: [M] detached, as they are used.
        reward_gradient: [M] differentiable: a reward whose own gradient is followed too (REAL's refinement), or None.
        action_logprob: [M] differentiable log-probability of a score that was drawn, and so is an action like the
            feedback's tokens; or None.
        action_sampled: [M] that of the same score under the distribution that it was drawn from, a constant; needed
            beside `action_logprob` with ``rollout.ahead``.
    """

    rewards: torch.Tensor
    advantages: torch.Tensor
    reward_gradient: torch.Tensor | None = None
    action_logprob: torch.Tensor | None = None
    action_sampled: torch.Tensor | None = None


class PolicyGradient(Method):
    """A method on rollouts. Arguments as of :class:`Method`."""

    uses_rollouts = True
    text_part = "exploration"
    """Name of the loss's part through the feedback's tokens."""
    explores = True
    """Whether the feedback's tokens are trained at all."""
    reads_engine_scores = False
    """Whether the loss is made of the engine's score log-probabilities, in every update."""

    def __init__(self, config: Config, encode_feedback: EncodeFeedback, scale: ScoreScale) -> None:
        super().__init__(config, encode_feedback, scale)
        self.options = config.objective
        self.ahead = config.rollout.ahead > 0
        self.ref_policy: RefPolicy | RefAdapters | None = None
        self.head = HeadOptions(temperature=config.rollout.temperature, validate=False)

    @classmethod
    def prompts_per_step(cls, config: Config) -> tuple[str, int]:
        """Judge prompts per update."""
        return "rollout.prompts_per_step", config.rollout.prompts_per_step

    @classmethod
    def check(cls, config: Config) -> None:
        """Leave-one-out needs others to leave one out of."""
        if config.rollout.group_size == 1 and config.objective.baseline == "leave_one_out":
            raise ConfigError(
                "rollout.group_size is 1, and objective.baseline is leave_one_out, which compares a rollout with the "
                "others of its prompt: raise rollout.group_size to 2 or more"
            )
        check_feedback_given(cls, config)

    @property
    def iterations(self) -> int:
        """Optimiser steps on the same rollouts."""
        return self.options.num_iterations

    @property
    def recomputes(self) -> bool:
        """Whether a token's coefficient depends on its own log-probability."""
        return self.options.kl_coef > 0 or self.options.num_iterations > 1 or self.ahead

    @property
    def keeps_ref_policy(self) -> bool:
        """For the KL, in the loss or measured."""
        return self.config.train.steps > 0 and (self.options.kl_coef > 0 or self.options.kl_every > 0)

    def begin(self, policy: Policy, run: Path, world: World = ALONE) -> None:
        """Freeze the reference policy and write it into the run's folder."""
        if self.keeps_ref_policy:
            self.ref_policy = self._frozen(policy)
            self.ref_policy.save(run, world)

    def resume(self, policy: Policy, run: Path, world: World = ALONE) -> None:
        """Read the reference policy; a run that only measures the KL goes on without one that it does not have."""
        if not self.keeps_ref_policy:
            return
        found = self._frozen(policy)
        try:
            with world.together():
                found.load(run, check=world.is_main)
        except (CheckpointError, ElsewhereError) as error:
            if self.options.kl_coef:
                raise
            logger.warning("the KL to the start is not measured: %s", error)
            return
        self.ref_policy = found

    def _frozen(self, policy: Policy) -> RefPolicy | RefAdapters:
        """The policy as it is now; a copy is on its device only where every step needs it."""
        if is_adapted(policy.model):
            return RefAdapters(policy, self.config.rollout.temperature)
        return RefPolicy(policy, self.config.rollout.temperature, resident=self.options.kl_coef > 0)

    def groups(
        self, rows: Sequence[JudgeRow], rows_seen: int, step: int, engine: RolloutEngine, compare: bool = False
    ) -> list[Group]:
        """Sampled feedback for the rows of an update."""
        rollout = self.config.rollout
        params = SamplingParams(
            n=rollout.group_size,
            max_tokens=rollout.max_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            answer=rollout.answer,
            seed=step_seed(self.config.seed, step),
            scores=compare or self.reads_engine_scores,
            texts=False,  # those that are shown are decoded where they are shown
        )
        rollouts = sample(engine, [row.prompt_ids for row in rows], params, self.scale, [row.id for row in rows])
        return [
            Group(n, row.prompt_ids, row.label, r, row_id=row.id)
            for n, (row, r) in enumerate(zip(rows, rollouts, strict=True))
        ]

    def prepares(self, step: int) -> bool:
        """Where the update trains on the KL, or measures it."""
        done, every = step + 1, self.options.kl_every
        due = every > 0 and (done % every == 0 or done == self.config.train.steps)
        return self.ref_policy is not None and (self.options.kl_coef > 0 or due)

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Give the batches the reference policy's log-probabilities."""
        assert self.ref_policy is not None
        for batch, logprobs in zip(batches, self.ref_policy.logprobs(batches), strict=True):
            batch.ref_logprobs = logprobs

    @abstractmethod
    def score(self, logp: torch.Tensor, batch: Batch) -> Scored:
        """Rewards and advantages of a micro-batch's rollouts.

        Args:
            logp: [M, K] log-probabilities of the score tokens, differentiable (float64 for a float64 model).
            batch: The micro-batch: `labels`, `rollout_valid`, `engine_score_logprobs`, `outcome`.
        """

    def fused(self, counts: UpdateCounts, compare: bool) -> Loss:
        """The loss with the gradient in the head's forward pass; arguments as of :meth:`loss`."""
        share = self._divisor(counts)

        def loss(hidden: torch.Tensor, weight: torch.Tensor, batch: Batch) -> LossOutput:
            logp = self._score_logprobs(hidden, weight, batch)
            scored = self.score(logp, batch)
            coefficients = -scored.advantages * self.explores / share
            per_row = coefficients[batch.rollout]
            computed = batch.rollout_valid[batch.rollout] if compare and self.explores else per_row != 0
            rows = computed.nonzero()[:, 0]
            text, found = weighted_logprob(
                hidden[batch.rows[rows]],
                weight,
                batch.targets[rows],
                per_row[rows],
                head=replace(self.head, unit_gradient=hidden.is_cuda),
            )
            parts = {self.text_part: text}
            if scored.reward_gradient is not None:
                parts["refinement"] = self._refinement(scored.reward_gradient, batch, counts)
            if scored.action_logprob is not None:
                weighted = weigh(-scored.advantages / share, scored.action_logprob)
                parts["score"] = torch.where(batch.rollout_valid, weighted, 0.0).sum()
            return self._output(parts, logp, scored, rows, found, computed)

        return loss

    def loss(self, counts: UpdateCounts, old: LossOutput | None = None, compare: bool = False) -> Loss:
        """See :meth:`Method.loss`."""
        loss = self._recomputed(counts, old, compare) if self.recomputes else self.fused(counts, compare)
        return loss if self.options.kl_coef or old is not None else self._with_kl_measured(loss)

    def _recomputed(self, counts: UpdateCounts, old: LossOutput | None, compare: bool) -> Loss:
        """The loss with the KL, the clipped ratio and the importance weights.

        The first iteration's policy gradient is that of :meth:`fused`: its ratio is 1, so A * ratio and A * logp have
        one gradient. Later ones keep its advantages, as PPO's bound supposes, which the sampling policy's rewards give.
        The gradient of the reward itself is that at the weights as they are, in every iteration; the rollouts are those
        of the first, and so it has the weight of :meth:`importance`.

        Rollouts that older weights sampled (``rollout.ahead``) are weighted in both parts: the reward's own gradient
        by the ratio of the policy as it is, the policy gradient by that of the first iteration, which PPO's ratio
        multiplies (the decoupled objective, arXiv 2110.00641). Baselines are not weighted: a rollout's leave-one-out
        baseline depends on the others alone, so whatever it is, it adds nothing to the expected gradient. Neither is
        the KL, which then is estimated at the sampler's tokens.
        """
        share, options = self._divisor(counts), self.options

        def loss(hidden: torch.Tensor, weight: torch.Tensor, batch: Batch) -> LossOutput:
            scores = self._score_logprobs(hidden, weight, batch)
            scored = self.score(scores, batch)
            if old is not None:
                assert old.rewards is not None and old.advantages is not None
                scored = replace(scored, rewards=old.rewards, advantages=old.advantages)
            ref_logprobs = batch.ref_logprobs if options.kl_coef else None
            per_row = scored.advantages[batch.rollout] * self.explores
            refines = scored.reward_gradient is not None and options.beta != 0
            weighs = self.ahead or (refines and self.iterations > 1)  # needs a rollout's tokens whatever its advantage
            every = ref_logprobs is not None or (compare and self.explores) or weighs
            computed = batch.rollout_valid[batch.rollout] if every else per_row != 0
            rows = computed.nonzero()[:, 0]
            trains = self.explores or ref_logprobs is not None  # else the log-probabilities are for the weights alone
            with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
                logp = linear_logprob(
                    hidden[batch.rows[rows]],
                    weight,
                    batch.targets[rows],
                    head=replace(self.head, validate=not hidden.is_cuda),
                )
            weights = self.importance(logp, rows, batch, scored, old) if weighs else None
            advantages = scored.advantages
            if self.ahead:
                of_first = weights if old is None else old.weights
                assert of_first is not None
                advantages = advantages * of_first
                per_row = per_row * of_first[batch.rollout]
            ratio, clipped = None, None
            value = weigh(per_row[rows], logp)
            if old is not None:
                value, ratio, clipped = clipped_surrogate(logp, old.logprobs[rows], per_row[rows], options.epsilon)
            exploration = -value.sum() / share
            parts = {self.text_part: exploration}
            if scored.reward_gradient is not None:
                reward = scored.reward_gradient if weights is None else scored.reward_gradient * weights
                parts["refinement"] = self._refinement(reward, batch, counts)
            if scored.action_logprob is not None:
                action = weigh(advantages, scored.action_logprob)
                if old is not None:
                    assert old.action_logprob is not None
                    action = clipped_surrogate(
                        scored.action_logprob, old.action_logprob, advantages, options.epsilon
                    ).value
                parts["score"] = -torch.where(batch.rollout_valid, action, 0.0).sum() / share
            kl = None
            if ref_logprobs is not None:
                kl = k3(logp, ref_logprobs[rows])
                parts["kl"] = options.kl_coef * kl.sum() / share
            out = self._output(parts, scores, scored, rows, logp.detach(), computed)
            kl = None if kl is None else kl.detach()
            return replace(out, kl=kl, ratio=ratio, clipped=clipped, weights=weights)

        return loss

    def importance(
        self, logp: torch.Tensor, rows: torch.Tensor, batch: Batch, scored: Scored, old: LossOutput | None
    ) -> torch.Tensor | None:
        """[M] weights of a micro-batch's rollouts, constants, cut at ``objective.importance_cap``.

        The probability of a rollout's actions now over that under the weights that sampled them: the engine's, one
        update older, with ``rollout.ahead``; else the first iteration's. Actions are its sampled tokens and, where one
        was drawn, its score: the reward then is of a score that the sampler drew. Where the score is integrated out,
        as in REAL, it is no action, and the reward is that of the policy as it is.

        Args:
            logp: [n] log-probabilities of tokens, now.
            rows: [n] which of the batch's [N] tokens these are; all of its valid rollouts.
            batch: The micro-batch.
            scored: Has the drawn scores' log-probabilities, if any.
            old: What the first iteration returned; None in the first.

        Returns:
            None where they are 1: in the first iteration on rollouts of the policy as it is.
        """
        rollout, count, cap = batch.rollout[rows], len(batch.labels), self.options.importance_cap
        if not self.ahead:
            return None if old is None else sequence_weights(logp, old.logprobs[rows], rollout, count, cap)
        sampled = batch.sampled_logprobs[rows]
        if scored.action_logprob is not None:
            assert scored.action_sampled is not None
            valid = batch.rollout_valid.nonzero()[:, 0]
            logp = torch.cat([logp, scored.action_logprob[valid]])
            sampled = torch.cat([sampled, scored.action_sampled[valid]])
            rollout = torch.cat([rollout, valid])
        return sequence_weights(logp, sampled, rollout, count, cap)

    def _with_kl_measured(self, loss: Loss) -> Loss:
        """The loss, which measures the KL too where the batch has the reference's log-probabilities; the same bits."""

        def measured(hidden: torch.Tensor, weight: torch.Tensor, batch: Batch) -> LossOutput:
            out = loss(hidden, weight, batch)
            if batch.ref_logprobs is None:
                return out
            row_valid = batch.rollout_valid[batch.rollout]
            # Rows that the loss left out, since their coefficient is 0, count here.
            missing = (row_valid & ~out.computed).nonzero()[:, 0]
            with torch.no_grad():
                found = linear_logprob(
                    hidden[batch.rows[missing]],
                    weight,
                    batch.targets[missing],
                    head=self.head,
                )
            out.kl = k3(out.logprobs.index_copy(0, missing, found), batch.ref_logprobs)[row_valid]
            return out

        return measured

    def advantages(self, rewards: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[M] advantages of rewards [M] within the batch's groups, as the config has them."""
        return group_advantages(
            rewards,
            batch.group,
            rollout_valid=batch.rollout_valid,
            baseline=self.options.baseline,
            normalize_std=self.options.normalize_std,
            clip=self.options.advantage_clip,
        )

    def values(self, like: torch.Tensor) -> torch.Tensor:
        """[K] scores of the scale, in the device and dtype of a tensor."""
        return self.scale.values_tensor(like.device).to(like.dtype)

    def _divisor(self, counts: UpdateCounts) -> int:
        """What the policy gradient's sum over tokens is divided by, as ``loss_norm`` says."""
        return counts.rollouts if self.options.loss_norm == "sequence_sum" else counts.tokens

    def _refinement(self, reward: torch.Tensor, batch: Batch, counts: UpdateCounts) -> torch.Tensor:
        return -self.options.beta * torch.where(batch.rollout_valid, reward, 0.0).sum() / counts.rollouts

    def _score_logprobs(self, hidden: torch.Tensor, weight: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[M, K], at temperature 1."""
        ids = self.scale.ids_tensor(hidden.device)
        return score_logprobs(hidden[batch.score_rows], weight, ids, head=HeadOptions(validate=not hidden.is_cuda))

    def _output(
        self,
        parts: dict[str, torch.Tensor],
        scores: torch.Tensor,
        scored: Scored,
        rows: torch.Tensor,
        logp: torch.Tensor,
        computed: torch.Tensor,
    ) -> LossOutput:
        """The loss's parts added up, and what is reported: `logp` [n] of the `rows` that `computed` [N] marks."""
        scores = scores.detach()
        total = next(iter(parts.values()))
        for part in list(parts.values())[1:]:
            total = total + part
        return LossOutput(
            total,
            scores,
            expected_score(scores, self.values(scores), self.options.renormalize),
            scores.new_full(computed.shape, float("nan")).index_copy(0, rows, logp),
            computed,
            {name: part.detach() for name, part in parts.items()},
            scored.rewards,
            scored.advantages,
            None if scored.action_logprob is None else scored.action_logprob.detach(),
        )


def check_feedback_given(method: type[Method], config: Config) -> None:
    """Only raft can do without feedback. Raises :class:`ConfigError`."""
    if config.supervised.feedback == "none":
        raise ConfigError(
            f'supervised.feedback is "none", and method {method.name} needs feedback: only raft goes without'
        )


def weigh(weights: torch.Tensor, logp: torch.Tensor) -> torch.Tensor:
    """Weights times log-probabilities, both [N]; a weight of 0 makes 0 of -inf too."""
    return torch.where(weights != 0, weights * logp, 0.0)


def k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimate of KL(policy, reference) at tokens drawn from the policy: ``exp(d) - 1 - d``.

    With ``d = ref_logp - logp``: never negative, 0 where the two agree, and unbiased over tokens drawn from the policy
    (http://joschu.net/blog/kl-approx.html, as in GRPO, arXiv 2402.03300). Differentiable in `logp`.

    Args:
        logp: [N] log-probabilities by the policy.
        ref_logp: [N] those by the reference policy.

    Returns:
        [N] nats.
    """
    d = ref_logp - logp
    return torch.expm1(d) - d


class Surrogate(NamedTuple):
    """See :func:`clipped_surrogate`; each is [N], and `value` alone carries a gradient.

    Attributes:
        value: What is maximised.
        ratio: Probability now over probability then.
        clipped: bool, where the clip took the gradient.
    """

    value: torch.Tensor
    ratio: torch.Tensor
    clipped: torch.Tensor


def clipped_surrogate(logp: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, epsilon: float) -> Surrogate:
    """PPO's ``min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon) * A)``, arXiv 1707.06347, equation 7.

    Args:
        logp: [N] log-probabilities now, differentiable.
        old: [N] those that the rollouts were first seen with; constants.
        advantages: [N] constants.
        epsilon: Half the clip's width.
    """
    ratio = (logp - old).exp()
    value = torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    above, below = (ratio > 1 + epsilon) & (advantages > 0), (ratio < 1 - epsilon) & (advantages < 0)
    return Surrogate(value, ratio.detach(), above | below)
