"""The paper's binary baseline: policy gradient of the reward 1[drawn score = label], the score drawn like a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from real_fast.methods.policy_gradient import PolicyGradient, Scored
from real_fast.rollout.engine import RolloutEngine
from real_fast.types import Batch, Group, JudgeRow
from real_fast.utils.seeds import random_stream, step_seed


class BinaryRL(PolicyGradient):
    """A label between two scores counts as the nearer one; a score off the scale is one outcome more.

    The gradient goes through log-probabilities alone: those of the feedback's tokens and of the drawn score. The score
    is an action like the tokens: where older weights sampled, they drew it too, and one weight of the whole sequence,
    score included, belongs to the tokens and to the score.
    """

    name = "binary_rl"
    text_part = "feedback"
    reads_engine_scores = True

    def groups(
        self, rows: Sequence[JudgeRow], rows_seen: int, step: int, engine: RolloutEngine, compare: bool = False
    ) -> list[Group]:
        """Sampled feedback, each with a score drawn from its distribution."""
        groups = super().groups(rows, rows_seen, step, engine, compare)
        draw_scores(groups, step_seed(self.config.seed, step))
        return groups

    def score(self, logp: torch.Tensor, batch: Batch) -> Scored:
        """The reward of the drawn score, and its log-probability."""
        rewards = outcome_reward(batch.labels.to(logp.dtype), self.values(logp), batch.outcome)
        action = outcome_logprob(logp, batch.outcome)
        drawn = outcome_logprob(batch.engine_score_logprobs.to(logp.dtype), batch.outcome) if self.ahead else None
        return Scored(rewards, self.advantages(rewards, batch), action_logprob=action, action_sampled=drawn)


def draw_scores(groups: Sequence[Group], seed: int) -> None:
    """Draw each rollout's score from its distribution: an outcome in 0..K, K for off the scale.

    A function of the seed, the group's place and the rollout's place; the engine's distribution is drawn from.
    """
    for group in groups:
        for place, rollout in enumerate(group.rollouts):
            if rollout.score_logprobs is None:
                continue
            left = random_stream(seed, group.index, place, 1).random()  # not the one that drew the feedback's tokens
            p = torch.tensor(rollout.score_logprobs, dtype=torch.float64).exp().tolist()
            rollout.outcome = len(p)
            for k, share in enumerate(p):
                left -= share
                if left < 0:
                    rollout.outcome = k
                    break


def outcome_logprob(logp: torch.Tensor, outcome: torch.Tensor) -> torch.Tensor:
    """[M] log-probability of each drawn score, given those of the K score tokens [M, K] and outcomes [M] in 0..K."""
    off = torch.log1p(-logp.exp().sum(1).clamp(max=1 - 1e-6))
    return torch.cat([logp, off[:, None]], 1).gather(1, outcome.clamp(min=0)[:, None])[:, 0]


def outcome_reward(labels: torch.Tensor, values: torch.Tensor, outcome: torch.Tensor) -> torch.Tensor:
    """[M] of 1 where the drawn score is the one nearest to the label (one of two, for a label between them), and 0."""
    distance = (labels[:, None].double() - values.double()).abs()
    nearest = distance <= distance.amin(1, keepdim=True) + 1e-6
    drawn = outcome[:, None] == torch.arange(len(values), device=outcome.device)
    return (nearest & drawn).any(1).to(values.dtype)
