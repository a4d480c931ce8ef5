"""Evaluation protocols: how feedback is sampled and a prediction read from it.

real: the score stands behind the phrase that the model wrote itself, in its own tokens; where it wrote none,
    ``rollout.answer`` says whether one is appended (the default) or the feedback counts as without a score. The
    prediction is RAIL's expected score y_hat = sum_k k * p_k.
tract: the feedback is cut where the phrase begins, whatever follows, and the phrase is appended in its own tokens; RAIL
    there. So the score is a function of the feedback alone, and every feedback has one. It coincides with "real" and
    ``rollout.answer: forced``, to the last bit, where the model wrote the phrase in the tokens that the tokenizer
    gives it, straight behind the feedback, or wrote none and no white space at the end; it differs where the model put
    the phrase on a line of its own, spelled it in other tokens, or ran on behind it ("score is:").
raft: no feedback at all: the phrase stands right behind the prompt, and RAIL is read there. For models trained so
    (method raft with ``supervised.feedback: none``).
decode: the prediction is the mean of the scores that the model wrote itself, and nothing is appended: what can be had
    without a model's probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from real_fast.config import EvalConfig, RolloutConfig
from real_fast.score.scale import ScoreScale
from real_fast.types import AnswerMode, Rollout, SamplingParams

ProtocolName = Literal["real", "tract", "raft", "decode"]


@dataclass(frozen=True)
class Prediction:
    """What the feedbacks on one response say of its score.

    Attributes:
        prediction: The protocol's score, None where there is none.
        distribution: {score: probability}, averaged over the feedbacks with a score; for "decode", each score's
            share of the written ones. None where there is no prediction.
        off_scale_mass: The model's probability outside the score tokens, averaged like the distribution; None where no
            feedback has a score distribution.
        decoded: Mean of the scores that the model wrote itself, None where it wrote none.
    """

    prediction: float | None
    distribution: dict[str, float] | None
    off_scale_mass: float | None
    decoded: float | None


def answer_mode(protocol: ProtocolName, answer: AnswerMode) -> AnswerMode:
    """How a protocol's rollouts are sampled; `answer` is ``rollout.answer``, which only "real" leaves a choice."""
    modes: dict[ProtocolName, AnswerMode] = {"real": answer, "tract": "cut", "raft": "none", "decode": "generated"}
    return modes[protocol]


def sampling(config: EvalConfig, rollout: RolloutConfig, seed: int) -> SamplingParams:
    """How an evaluation samples: `config` has the protocol, n and the temperature, `rollout` the rest."""
    bare = config.protocol == "raft"  # one token is sampled and thrown away; a second one would give the same score
    return SamplingParams(
        n=1 if bare else config.n,
        max_tokens=1 if bare else rollout.max_tokens,
        temperature=config.temperature,
        top_p=rollout.top_p,
        answer=answer_mode(config.protocol, rollout.answer),
        seed=seed,
    )


def probabilities(rollout: Rollout) -> NDArray[np.float64] | None:
    """[K] float64 full-softmax probabilities of the scores, None where there is no score or one is not finite."""
    if rollout.score_logprobs is None:
        return None
    p = np.exp(np.asarray(rollout.score_logprobs, dtype=np.float64))
    return p if np.isfinite(p).all() else None


def read(rollouts: Sequence[Rollout], scale: ScoreScale, protocol: ProtocolName, renormalize: bool) -> Prediction:
    """Read the prediction from the rollouts of one prompt.

    Args:
        rollouts: Sampled with :func:`answer_mode`.
        scale: The score scale.
        protocol: How.
        renormalize: Divide p by its sum, as training with ``objective.renormalize`` does; off_scale_mass stays as the
            model gave it, and "decode" has no p to divide.
    """
    found = [p for p in map(probabilities, rollouts) if p is not None and (p.sum() > 0 or not renormalize)]
    written = [r.written_score for r in rollouts if r.written_score is not None]
    decoded = float(np.mean(written)) if written else None
    off_scale = max(0.0, 1.0 - float(np.mean([p.sum() for p in found]))) if found else None
    if protocol == "decode":
        share = [written.count(value) / len(written) for value in scale.values] if written else None
        return Prediction(decoded, _named(scale, share), off_scale, decoded)
    if not found:
        return Prediction(None, None, None, decoded)
    p = np.mean([p / p.sum() for p in found] if renormalize else found, axis=0)
    return Prediction(float(p @ np.asarray(scale.values)), _named(scale, p.tolist()), off_scale, decoded)


def _named(scale: ScoreScale, p: Sequence[float] | None) -> dict[str, float] | None:
    return None if p is None else dict(zip(scale.names, p, strict=True))
