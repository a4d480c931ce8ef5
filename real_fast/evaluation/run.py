"""Evaluation: sample feedback, read the score distribution, compare with the labels."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from real_fast.config import EvalConfig, RolloutConfig
from real_fast.data.rows import row_key
from real_fast.evaluation.benchmarks import EvalResult, together
from real_fast.evaluation.metrics import calibration, summarize
from real_fast.rollout.checked import sample
from real_fast.rollout.engine import RolloutEngine
from real_fast.score.protocol import ProtocolName, probabilities, read, sampling
from real_fast.score.scale import ScoreScale
from real_fast.types import JudgeRow, Rollout, SamplingParams
from real_fast.utils.seeds import call_seed

_SEQUENCES_PER_CALL = 64


def evaluate(
    engine: RolloutEngine,
    rows: Sequence[JudgeRow],
    scale: ScoreScale,
    config: EvalConfig,
    rollout: RolloutConfig,
    seed: int,
    progress: Callable[[int], object] | None = None,
    renormalize: bool = False,
) -> EvalResult:
    """Sample ``config.n`` feedbacks a row and predict its score by ``config.protocol``.

    Rows of several benchmarks are evaluated benchmark by benchmark, each as it would be alone.

    The prediction is the protocol's (:mod:`real_fast.score.protocol`): RAIL's expected score y_hat = sum_k k * p_k
    (arXiv 2603.17145), p the softmax over the whole vocabulary at the score's position, averaged over the feedbacks
    that have one; or, with "decode", the mean of the scores that the model wrote itself, which stands beside it in
    either case.
    Where there is none, the prediction is None, never a made-up number.

    Args:
        engine: Samples; it decides how many sequences run at a time.
        rows: Rows with their `prompt_ids`.
        scale: The score scale.
        config: protocol, n, temperature, resamples.
        rollout: max_tokens, top_p and (with the protocol "real") answer are used.
        seed: The same seed gives the same samples and intervals.
        progress: Called with the number of rows that were just finished.
        renormalize: Divide p by its sum, as training with ``objective.renormalize`` does.

    Returns:
        `predictions` with id, key (:func:`real_fast.data.rows.row_key`), prompt_id, label, prediction, distribution,
        off_scale_mass, decoded (see :class:`real_fast.score.protocol.Prediction`), feedback (a text, a list of texts
        for n > 1) and n.
        `summary` with the protocol, the keys of :func:`summarize` for the predictions and, under
        ``decoded``, for the written scores; off_scale_mass, label_probability and calibration_error
        (:func:`calibration`); mean_length (sampled tokens a feedback; with "tract" those in front of
        the phrase), truncated (share of feedbacks cut at max_tokens), not_finite (feedbacks whose probabilities are
        NaN, which count as without a score), tokens_per_second and seconds of the sampling. For several benchmarks,
        see :func:`real_fast.evaluation.benchmarks.together`.

    Raises:
        ValueError: No rows, or a row without `prompt_ids`.
    """
    if not rows:
        raise ValueError("there are no rows to evaluate")
    for row in rows:
        if not row.prompt_ids:
            raise ValueError(f"row {row.id!r} has no prompt_ids: build its prompt first")
    names = list(dict.fromkeys(row.benchmark for row in rows))
    found: dict[str, EvalResult] = {}
    for name in names:
        some = [row for row in rows if row.benchmark == name]
        start = time.perf_counter()
        rollouts = _sample(
            engine, some, config.n, scale, lambda at: sampling(config, rollout, call_seed(seed, at)), progress
        )
        seconds = time.perf_counter() - start
        predictions = [
            _predict(row, group, scale, config.protocol, renormalize) for row, group in zip(some, rollouts, strict=True)
        ]
        summary = {
            "protocol": config.protocol,
            **_summary(predictions, scale, config.bootstrap, seed),
            **_of_sampling([r for group in rollouts for r in group], seconds),
        }
        found[name] = EvalResult(predictions, summary)
    return found[""] if names == [""] else together(found)


def _sample(
    engine: RolloutEngine,
    rows: Sequence[JudgeRow],
    n: int,
    scale: ScoreScale,
    params: Callable[[int], SamplingParams],
    progress: Callable[[int], object] | None,
) -> list[list[Rollout]]:
    """`n` rollouts of every row, some rows at a time; `params` says how, given the place of the first of them."""
    rollouts: list[list[Rollout]] = []
    step = max(1, _SEQUENCES_PER_CALL // n)
    for at in range(0, len(rows), step):
        some = rows[at : at + step]
        prompts, names = [row.prompt_ids for row in some], [row.id for row in some]
        rollouts.extend(sample(engine, prompts, params(at), scale, names, scored=False))
        if progress is not None:
            progress(len(some))
    return rollouts


def _of_sampling(rollouts: Sequence[Rollout], seconds: float) -> dict[str, Any]:
    """What a summary says of how its feedback was sampled."""
    tokens = sum(len(r.sampled_ids) for r in rollouts)
    return {
        "mean_length": tokens / len(rollouts),
        "truncated": sum(r.finish == "length" for r in rollouts) / len(rollouts),
        "not_finite": sum(r.has_score and probabilities(r) is None for r in rollouts),
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "seconds": seconds,
    }


def _predict(
    row: JudgeRow, rollouts: Sequence[Rollout], scale: ScoreScale, protocol: ProtocolName, renormalize: bool
) -> dict[str, Any]:
    found = read(rollouts, scale, protocol, renormalize)
    texts = [r.text for r in rollouts]
    return {
        "id": row.id,
        "key": row_key(row),
        "prompt_id": row.prompt_id,
        "label": row.label,
        "prediction": found.prediction,
        "distribution": found.distribution,
        "off_scale_mass": found.off_scale_mass,
        "decoded": found.decoded,
        "feedback": texts[0] if len(texts) == 1 else texts,
        "n": len(rollouts),
    }


def _summary(predictions: list[dict[str, Any]], scale: ScoreScale, bootstrap: int, seed: int) -> dict[str, Any]:
    labels = [p["label"] for p in predictions]
    prompts = [p["prompt_id"] for p in predictions]
    scored = [p for p in predictions if p["distribution"] is not None]
    off_scale = [p["off_scale_mass"] for p in predictions if p["off_scale_mass"] is not None]
    calibrated = calibration(
        [list(p["distribution"].values()) for p in scored], scale.values, [p["label"] for p in scored]
    )
    return {
        **summarize([p["prediction"] for p in predictions], labels, prompts, bootstrap, seed),
        "off_scale_mass": float(np.mean(off_scale)) if off_scale else None,
        "label_probability": calibrated["label_probability"],
        "calibration_error": calibrated["error"],
        "decoded": summarize([p["decoded"] for p in predictions], labels, prompts, bootstrap, seed),
    }
