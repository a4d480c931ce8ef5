"""The engine against the trainer: both must give the same tokens the same probabilities.

A stale weight sync, a wrong token id, a slip in the template or another temperature shows up here before it shows up in
a reward curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from real_fast.config import RolloutConfig
from real_fast.errors import EngineMismatchError
from real_fast.score.scale import ScoreScale
from real_fast.types import Rollout
from real_fast.utils.flat import flat

Row = torch.Tensor | Sequence[float]

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


def compare(
    rollouts: Sequence[Rollout],
    trainer_logprobs: Sequence[Row],
    trainer_scores: Sequence[Row | None],
    scale: ScoreScale,
    mask: Sequence[Row] | None = None,
) -> EngineGap:
    """Compare what the engine reported with what the trainer computed for the same rollouts.

    Args:
        rollouts: From the engine.
        trainer_logprobs: For each rollout the log-probabilities of its ``sampled_ids``, at the sampling temperature.
        trainer_scores: For each rollout K log-probabilities of the score tokens, or None where it has no score or the
            trainer has not computed it.
        scale: The score scale.
        mask: For each rollout which of its sampled tokens the trainer has computed; without it, all.

    Raises:
        ValueError: Numbers of rollouts, tokens or scores that do not belong together.
    """
    counts = {len(rollouts), len(trainer_logprobs), len(trainer_scores), len(rollouts if mask is None else mask)}
    if len(counts) > 1:
        raise ValueError(
            f"{len(rollouts)} rollouts, {len(trainer_logprobs)} rows of log-probabilities, {len(trainer_scores)} of "
            f"scores and {len(rollouts if mask is None else mask)} of the mask: there must be one for each rollout"
        )
    scored = [i for i, r in enumerate(rollouts) if r.score_logprobs is not None and trainer_scores[i] is not None]
    _check_lengths(rollouts, trainer_logprobs, trainer_scores, scored, len(scale.values), mask)
    # All tokens at once: a tensor operation on a rollout's few hundred takes as long as one on all of them.
    computed = None if mask is None else _flat(mask).bool()
    mine = flat((r.sampled_logprobs for r in rollouts), torch.float64)
    scores = flat((rollouts[i].score_logprobs or () for i in scored), torch.float64)
    theirs = _flat([trainer_scores[i] for i in scored])
    return gap(mine, _flat(trainer_logprobs), computed, scores, theirs, scale)


def gap(
    logprobs: torch.Tensor,
    trainer_logprobs: torch.Tensor,
    computed: torch.Tensor | None,
    scores: torch.Tensor,
    trainer_scores: torch.Tensor,
    scale: ScoreScale,
) -> EngineGap:
    """:func:`compare` on what lies in tensors already, all on the CPU.

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


def _check_lengths(
    rollouts: Sequence[Rollout],
    logprobs: Sequence[Row],
    scores: Sequence[Row | None],
    scored: Sequence[int],
    values: int,
    mask: Sequence[Row] | None,
) -> None:
    """Raise :class:`ValueError` for the first rollout whose numbers are not as many as its tokens, or as the scores."""
    with_score = set(scored)
    for i, (rollout, theirs) in enumerate(zip(rollouts, logprobs, strict=True)):
        n, chosen = len(rollout.sampled_logprobs), len(rollout.sampled_logprobs if mask is None else mask[i])
        if not n == len(theirs) == chosen:
            raise ValueError(
                f"rollout {i} has {n} sampled tokens, and the trainer's log-probabilities {len(theirs)}, the mask "
                f"{chosen}"
            )
        mine, other = rollout.score_logprobs, scores[i]
        if i in with_score and mine is not None and other is not None and not len(mine) == len(other) == values:
            raise ValueError(f"rollout {i}: {len(mine)} and {len(other)} score log-probabilities for {values} scores")


def trainer_logprobs_of(
    model: Any,
    prompts: Sequence[Sequence[int]],
    rollouts: Sequence[Rollout],
    scale: ScoreScale,
    temperature: float,
    autocast_dtype: torch.dtype | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """What :func:`compare` needs, by one plain forward pass per sequence: slow, and simple enough to trust.

    Args:
        model: A Transformers causal language model; its mode (training or evaluation) is left as it is.
        prompts: Token ids, one prompt for each rollout.
        rollouts: The rollouts.
        scale: The score scale.
        temperature: The sampling temperature; 0 counts as 1.
        autocast_dtype: Run the forward passes under autocast with this dtype.

    Returns:
        For each rollout the log-probabilities of its sampled ids, [tokens] fp32; and the K log-probabilities of the
        score tokens behind its context (temperature 1), [K] fp32, or None where it has no score.
    """
    logprobs: list[torch.Tensor] = []
    scores: list[torch.Tensor | None] = []
    autocast = nullcontext() if autocast_dtype is None else torch.autocast(model.device.type, autocast_dtype)
    with torch.no_grad(), autocast:
        for prompt, rollout in zip(prompts, rollouts, strict=True):
            ids = torch.tensor([[*prompt, *rollout.context_ids]], device=model.device)
            # Row i of what is kept predicts the i-th token behind the prompt; the last row is where the score stands.
            rows = len(rollout.context_ids) + 1
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=rows).logits[0].float()
            targets = torch.tensor(rollout.sampled_ids, dtype=torch.int64, device=model.device)
            sampled = (logits[: len(targets)] / (temperature or 1.0)).log_softmax(-1)
            logprobs.append(sampled.gather(-1, targets[:, None])[:, 0])
            scores.append(logits[-1].log_softmax(-1)[scale.ids_tensor(model.device)] if rollout.has_score else None)
    return logprobs, scores


def _flat(rows: Sequence[Row | None]) -> torch.Tensor:
    """[sum of lengths] in their dtype, float64 for lists; on the CPU, by one copy from the device."""
    tensors = [row for row in rows if isinstance(row, torch.Tensor)]
    if tensors and len(tensors) == len(rows):
        return torch.cat(tensors).detach().cpu()
    return flat((row.tolist() if isinstance(row, torch.Tensor) else row or () for row in rows), torch.float64)


def _mean_and_max(gaps: torch.Tensor) -> tuple[float, float]:
    return (float(gaps.mean()), float(gaps.max())) if len(gaps) else (0.0, 0.0)
