"""The engine against the trainer: both must give the same tokens the same probabilities.

A stale weight sync, a wrong token id, a slip in the template or another temperature shows up here before it shows up in
a reward curve.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from real_fast.config import RolloutConfig
from real_fast.errors import EngineMismatchError
from real_fast.score.scale import ScoreScale

# Largest mean differences of a log-probability and of an expected score that are put down to rounding, by what the
# engine computes in. Measured with SmolLM2-135M on two kinds of CPU: see docs/rollouts.md.
_EXACT, _ROUNDED = (1e-3, 1e-3), (0.08, 0.03)


def limits(config: RolloutConfig, dtype: torch.dtype) -> tuple[float, float]:
    """``rollout.check_logprob`` and ``rollout.check_score``; where they are None, what rounding to `dtype` explains."""
    logprob, score = _EXACT if dtype == torch.float32 else _ROUNDED
    return (
        logprob if config.check_logprob is None else config.check_logprob,
        score if config.check_score is None else config.check_score,
    )


@dataclass(frozen=True)
class EngineGap:
    """Absolute differences between engine and trainer.

    Attributes:
        tokens: Sampled tokens compared.
        logprob_mean: Mean difference of a sampled token's log-probability, in nats.
        logprob_max: The largest.
        scores: Score distributions compared.
        score_mean: Mean difference of the expected score, as a share of the scale's range.
        score_max: The largest.
    """

    tokens: int
    logprob_mean: float
    logprob_max: float
    scores: int
    score_mean: float
    score_max: float

    def metrics(self) -> dict[str, float]:
        """For the log, under TRL's names where TRL has the thing; what was not compared is left out."""
        logged: dict[str, float] = {}
        if self.tokens:
            logged["sampling/sampling_logp_difference/mean"] = self.logprob_mean
            logged["sampling/sampling_logp_difference/max"] = self.logprob_max
        if self.scores:
            logged["sampling/score_difference/mean"] = self.score_mean
            logged["sampling/score_difference/max"] = self.score_max
        return logged

    def raise_if_above(self, config: RolloutConfig, step: int, dtype: torch.dtype) -> None:
        """Raise :class:`EngineMismatchError` where a mean difference is above its limit or not a number.

        Args:
            config: check_logprob and check_score are used.
            step: Named in the message.
            dtype: What the engine computes in; of the trainer, what is coarser of the two.
        """
        most_logprob, most_score = limits(config, dtype)
        logprob_fine = not self.tokens or self.logprob_mean <= most_logprob
        score_fine = not self.scores or self.score_mean <= most_score
        if logprob_fine and score_fine:
            return
        raise EngineMismatchError(
            f"step {step}: the rollout engine and the trainer disagree. Log-probability of a sampled token: mean "
            f"difference {self.logprob_mean:.4f}, largest {self.logprob_max:.4f} over {self.tokens} tokens "
            f"(rollout.check_logprob allows a mean of {most_logprob}). Expected score, as a share of the "
            f"scale: mean {self.score_mean:.4f}, largest {self.score_max:.4f} over {self.scores} rollouts "
            f"(rollout.check_score allows {most_score}). Usual causes: the engine holds old weights (a sync "
            "was missed or incomplete); the two see different token ids (chat template, prompt truncated, text encoded "
            f"anew); temperature or top_p differ. If it is only the precision ({str(dtype).removeprefix('torch.')} "
            "here), raise the limits"
        )


def gap(
    logprobs: torch.Tensor,
    trainer_logprobs: torch.Tensor,
    computed: torch.Tensor | None,
    scores: torch.Tensor,
    trainer_scores: torch.Tensor,
    scale: ScoreScale,
) -> EngineGap:
    """Compare what the engine reported with what the trainer computed for the same rollouts, all on the CPU.

    Args:
        logprobs: [N] float64, the engine's log-probabilities of all sampled tokens, at the sampling temperature.
        trainer_logprobs: [N], the trainer's.
        computed: [N] bool, tokens that the trainer has computed; None for all.
        scores: [S, K] or flat, float64, the engine's log-probabilities of the score tokens where it has any.
        trainer_scores: As many, the trainer's.
        scale: The score scale, of K scores.
    """
    token_gaps = (logprobs - trainer_logprobs.double()).abs()
    if computed is not None:
        token_gaps = token_gaps[computed]
    values = torch.tensor(scale.values, dtype=torch.float64)
    probabilities = [x.double().exp().reshape(-1, len(values)) for x in (scores, trainer_scores)]
    score_gaps = ((probabilities[0] - probabilities[1]) @ values).abs() / scale.span
    return EngineGap(len(token_gaps), *_mean_and_max(token_gaps), len(score_gaps), *_mean_and_max(score_gaps))


def _mean_and_max(gaps: torch.Tensor) -> tuple[float, float]:
    return (float(gaps.mean()), float(gaps.max())) if len(gaps) else (0.0, 0.0)
