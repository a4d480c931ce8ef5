"""What an engine gives is looked at before anything is made of it, in training, evaluations and judging alike."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from real_fast.errors import EngineError, UserError
from real_fast.rollout.engine import RolloutEngine, publish
from real_fast.score.scale import ScoreScale
from real_fast.types import Rollout, SamplingParams
from real_fast.utils.flat import flat

logger = logging.getLogger(__name__)

ROUNDING = 0.01  # nats that a log-probability may be above 0, and the sum of some probabilities above 1
_LONGEST = 300  # characters of an engine's own message


def sample(
    engine: RolloutEngine,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    scale: ScoreScale,
    names: Sequence[str],
    scored: bool = True,
) -> list[list[Rollout]]:
    """Sample, and :func:`check` what comes back.

    Args:
        engine: Samples.
        prompts: Token ids.
        sampling: How.
        scale: The score scale.
        names: Ids of the prompts' rows, for messages.
        scored: As of :func:`check`.

    Raises:
        EngineError: The engine failed, in whatever way, or gave what cannot be samples of the prompts.
        UserError: What engines say themselves, such as a server that does not answer.
    """
    try:
        found = engine.generate(prompts, sampling)
    except EngineError as error:
        if error.place is None:
            raise
        raise EngineError(f"row {names[error.place]!r}: {error}") from error
    except UserError:
        raise
    except Exception as error:  # engines raise a dozen unrelated kinds, memory among them
        what = f"while it sampled for {len(prompts)} rows, {names[0]!r} to {names[-1]!r}"
        raise EngineError(f"the rollout engine {engine.name} failed {what} {_said(error)}") from error
    try:
        check(found, engine, len(prompts), sampling, scale, names, scored)
    except EngineError as error:
        error.on_all_ranks = True  # which all have these rollouts
        raise
    return found


def give_weights(engine: RolloutEngine, model: Any) -> None:
    """Hand the trainer's weights to an engine; all ranks call this.

    Raises:
        EngineError: The engine failed, in whatever way.
        UserError: As :func:`sample`.
    """
    try:
        publish(engine, model)
    except UserError:
        raise
    except Exception as error:
        raise EngineError(
            f"the rollout engine {engine.name} failed while it took the trainer's weights over {_said(error)}"
        ) from error


def _said(error: Exception) -> str:
    logger.debug("the rollout engine failed", exc_info=error)
    text = " ".join(str(error).split())[:_LONGEST]
    return f"({type(error).__name__}: {text or 'no reason given'}; --log_level debug shows where)"


def check(
    found: Sequence[Sequence[Rollout]],
    engine: RolloutEngine,
    prompts: int,
    sampling: SamplingParams,
    scale: ScoreScale,
    names: Sequence[str] = (),
    scored: bool = True,
) -> None:
    """Refuse what cannot be samples of the prompts; a few passes over each list, by C code.

    Log-probabilities that are merely wrong do not show here: the comparison with the trainer
    (:mod:`real_fast.rollout.agreement`) finds them.

    Args:
        found: What the engine gave.
        engine: Its name and vocabulary are used.
        prompts: How many prompts it was given.
        sampling: How it was to sample.
        scale: The score scale.
        names: Ids of the prompts' rows; without, a message has the prompt's place.
        scored: Whether score log-probabilities that are missing or NaN are refused; evaluations and judges, which count
            such a feedback as one without a score, go on.

    Raises:
        EngineError: Names the row, the rollout and what is wrong.
    """
    try:
        _check(found, engine, prompts, sampling, scale, names, scored)
    except (TypeError, AttributeError) as error:  # None in the place of a list, say
        raise EngineError(f"the rollout engine {engine.name} gave no lists of rollouts: {error}") from error


def _check(
    found: Sequence[Sequence[Rollout]],
    engine: RolloutEngine,
    prompts: int,
    sampling: SamplingParams,
    scale: ScoreScale,
    names: Sequence[str],
    scored: bool,
) -> None:
    if len(found) != prompts:
        raise EngineError(f"the rollout engine {engine.name} gave rollouts of {len(found)} prompts, and got {prompts}")
    usual = _all_usual([rollout for group in found for rollout in group], engine.vocabulary)
    for place, group in enumerate(found):
        name = f"row {names[place]!r}" if names else f"prompt {place}"
        if len(group) != sampling.n:
            raise EngineError(
                f"{name}: the rollout engine {engine.name} gave {len(group)} rollouts, and {sampling.n} were asked for"
            )
        for number, rollout in enumerate(group):
            try:
                wrong = _tokens(rollout, sampling, engine.vocabulary, usual) or _scores(
                    rollout, sampling, scale, scored
                )
            except TypeError as error:  # None among numbers
                wrong = str(error)
            if wrong:
                raise EngineError(f"{name}, rollout {number}: the rollout engine {engine.name} gave no sample: {wrong}")


def _all_usual(rollouts: Sequence[Rollout], vocabulary: int) -> bool:
    """Whether no sampled id and no log-probability can be wrong, all of them at once; else each has to be looked at.

    A sum of numbers that are not above 0 is finite where that of each rollout is.
    """
    try:
        ids = flat(r.sampled_ids for r in rollouts)
        logprobs = flat((r.sampled_logprobs for r in rollouts), torch.float64)
    except (TypeError, OverflowError):  # no numbers
        return False
    if not len(ids) or not len(logprobs):
        return False
    known = 0 <= int(ids.min()) <= int(ids.max()) < vocabulary
    return known and float(logprobs.max()) <= ROUNDING and math.isfinite(float(logprobs.sum()))


def _tokens(r: Rollout, sampling: SamplingParams, vocabulary: int, usual: bool) -> str:
    """What is wrong with the sampled tokens, or ""; `usual`: what :func:`_all_usual` says."""
    ids, context, text = r.sampled_ids, r.context_ids, sampling.answer in ("forced", "generated")
    kept = len(context) - r.n_forced
    same = kept >= 0 and (ids if kept >= len(ids) else ids[:kept]) == context[:kept]
    for some in (() if usual else ids, context[kept:] if same else context):
        if some and not 0 <= min(some) <= max(some) < vocabulary:
            wrong = next(token for token in some if not 0 <= token < vocabulary)
            return f"the token id {wrong}, and the model has the ids 0 to {vocabulary - 1}"
    if len(ids) != len(r.sampled_logprobs):
        return f"{len(ids)} sampled tokens and {len(r.sampled_logprobs)} log-probabilities"
    if len(ids) > sampling.max_tokens:
        return f"{len(ids)} sampled tokens, and max_tokens is {sampling.max_tokens}"
    if text and not ids and r.finish != "phrase":
        return "an empty text"
    # It goes on until the verdict, the end or the limit; one that an engine dropped on the way does not.
    if text and r.finish == "length" and r.written_score is None and len(ids) < sampling.max_tokens:
        return f"it breaks off after {len(ids)} of {sampling.max_tokens} tokens, with neither an end nor a verdict"
    if not same or len(ids) - kept not in (0, 1):
        return "the sampled tokens are not those that the score's context begins with"
    if usual or not ids:
        return ""
    if not math.isfinite(sum(r.sampled_logprobs)):
        return "a sampled token's log-probability is not finite"
    if max(r.sampled_logprobs) > ROUNDING:
        return f"a sampled token's log-probability is {max(r.sampled_logprobs):.4g}, and none is above 0"
    return ""


def _scores(r: Rollout, sampling: SamplingParams, scale: ScoreScale, scored: bool) -> str:
    """What is wrong with the score, or ""."""
    if r.score_logprobs is None:
        asked = scored and sampling.scores and (sampling.answer != "generated" or r.unread)
        return "no score log-probabilities, which were asked for" if asked else ""
    if len(r.score_logprobs) != len(scale.values):
        return f"{len(r.score_logprobs)} score log-probabilities, and the scale has {len(scale.values)} scores"
    if any(math.isnan(x) for x in r.score_logprobs):
        return "the score log-probabilities are NaN" if scored else ""
    return no_distribution(r.score_logprobs)


def no_distribution(logprobs: Sequence[float]) -> str:
    """Why log-probabilities of some tokens of a vocabulary, which are not NaN, cannot be that; or ""."""
    if max(logprobs) > ROUNDING:
        return f"a score's log-probability is {max(logprobs):.4g}, and none is above 0"
    if (total := sum(map(math.exp, logprobs))) > 1 + ROUNDING:
        return f"the scores' probabilities add up to {total:.4g}"
    return ""
