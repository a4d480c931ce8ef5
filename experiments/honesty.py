"""Is a judge's distribution honest: calibration, and intervals that hold the label as often as they say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression

from real_fast.evaluation.metrics import calibration, correlations

Array = NDArray[np.float64]
COVERAGE = 0.8


def honesty(values: Sequence[float], dev: tuple[Array, Array], test: tuple[Array, Array]) -> dict[str, float | None]:
    """Calibration and intervals on the graded rows, before and after a fit on dev rows of the same benchmark.

    Args:
        values: [K] the scores.
        dev: [n, 1 + K] predictions, each with the probabilities of the scores, and [n] labels.
        test: The same of the graded rows.

    Returns:
        ``error``: mean distance of expected score and label over bins of the expected score, and ``fitted_error`` and
        ``fitted_rmse`` after an isotonic regression; ``coverage`` and ``width`` of the central 80 % interval of the
        distribution, ``claimed``, the share that the distribution itself has within (more than 80 %, as an interval
        holds scores whole), and ``conformal_coverage`` and ``conformal_width`` after it was widened (or narrowed) by
        what the dev rows ask for. All in score units but the coverages; None for a judge without a distribution.
    """
    k = np.asarray(values, dtype=np.float64)
    (predicted, labels), (known, truth) = test, dev
    fit = IsotonicRegression(y_min=k[0], y_max=k[-1], out_of_bounds="clip").fit(known[:, 0], truth)
    fitted = fit.predict(predicted[:, 0])
    low, high = central(predicted[:, 1:], k)
    dev_low, dev_high = central(known[:, 1:], k)
    more = widening(dev_low, dev_high, truth)
    wide_low, wide_high = (np.clip(end, k[0], k[-1]) for end in (low - more, high + more))
    return {
        "error": _error(predicted[:, 0], labels),
        "fitted_error": _error(fitted, labels),
        "rmse": correlations(predicted[:, 0], labels)["rmse"],
        "fitted_rmse": correlations(fitted, labels)["rmse"],
        "coverage": float(np.mean((low <= labels) & (labels <= high))),
        "claimed": float(np.mean(mass_within(predicted[:, 1:], k, low, high))),
        "width": float(np.mean(high - low)),
        "conformal_coverage": float(np.mean((wide_low <= labels) & (labels <= wide_high))),
        "conformal_width": float(np.mean(np.maximum(wide_high - wide_low, 0))),
    }


def central(probabilities: Array, values: Array) -> tuple[Array, Array]:
    """Ends of the central 80 % of each row's distribution over the scores, [n] each.

    Labels lie between scores too, so a score stands for all that is nearest to it: the interval reaches from half a
    score below the 10 % quantile to half a score above the 90 % quantile, within the scale.
    """
    share = np.cumsum(probabilities / probabilities.sum(axis=1, keepdims=True), axis=1)
    edges = np.concatenate([values[:1], (values[1:] + values[:-1]) / 2, values[-1:]])
    tail = (1 - COVERAGE) / 2
    first, last = ((share < at - 1e-9).sum(axis=1) for at in (tail, 1 - tail))
    return edges[np.minimum(first, len(values) - 1)], edges[np.minimum(last, len(values) - 1) + 1]


def mass_within(probabilities: Array, values: Array, low: Array, high: Array) -> Array:
    """[n] share of each row's distribution over the scores that lies between two ends."""
    inside = (values >= low[:, None]) & (values <= high[:, None])
    return np.asarray((probabilities * inside).sum(axis=1) / probabilities.sum(axis=1), dtype=np.float64)


def widening(low: Array, high: Array, labels: Array) -> float:
    """How far intervals must reach out so that 80 % of such rows lie within (conformalised quantile regression)."""
    outside = np.sort(np.maximum(low - labels, labels - high))
    place = math.ceil(COVERAGE * (len(outside) + 1)) - 1
    return float(outside[min(place, len(outside) - 1)])


def arrays(predictions: dict[str, list[float | None]], rows: Sequence[dict[str, Any]]) -> tuple[Array, Array] | None:
    """Predictions with their distribution, and labels, of the rows that have one; None for fewer than two."""
    both = [(predictions[row["id"]], row["score"]) for row in rows]
    full = [(p, y) for p, y in both if len(p) > 1 and None not in p and sum(v or 0.0 for v in p[1:]) > 0]
    if len(full) < 2:
        return None
    return np.array([p for p, _ in full], dtype=np.float64), np.array([y for _, y in full], dtype=np.float64)


def _error(predicted: Array, labels: Array) -> float | None:
    """Calibration's error as the evaluation defines it: one score with the prediction as its probability."""
    found: float | None = calibration(predicted[:, None], [1.0], labels)["error"]
    return found
