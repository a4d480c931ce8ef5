"""How well predicted scores agree with labels: correlations, errors, bootstrap intervals, calibration.

What cannot be computed is None, with the reason beside it; no NaN leaves this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

CORRELATIONS = ("pearson", "spearman", "kendall")
WITH_INTERVALS = (*CORRELATIONS, "rmse")
_TEST = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}
# Values closer together than this share of their size are equal but for rounding, and correlate with nothing.
_EQUAL = 1e-12


def correlations(predicted: ArrayLike, label: ArrayLike, names: Sequence[str] = CORRELATIONS) -> dict[str, Any]:
    """Agreement of predictions with labels.

    Args:
        predicted: [n] finite numbers.
        label: [n] finite numbers, in the same unit.
        names: The correlations that somebody reads; others are None.

    Returns:
        ``n``; ``pearson``, ``spearman`` and ``kendall`` (tau-b), each None for fewer than 3 rows and for constant
        predictions or labels; ``rmse``, ``mae`` and ``bias`` (mean of predicted minus label) in the unit of the scores,
        None for no rows; ``reasons``, a sentence for every None.

    Raises:
        ValueError: Shapes differ, or a number is not finite.
    """
    x, y = np.asarray(predicted, dtype=np.float64), np.asarray(label, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"predictions and labels must be lists of one length, not of shapes {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a prediction or label is not a finite number")
    n = len(x)
    result: dict[str, Any] = dict.fromkeys(CORRELATIONS)
    reasons = {}
    why = _no_correlation(x, y)
    for name in names:
        value = math.nan if why else float(_TEST[name](x, y).statistic)
        if math.isfinite(value):
            result[name] = value
        else:
            reasons[name] = why or "the numbers are too large or too close together"
    error = x - y
    result["rmse"] = float(np.sqrt(np.mean(error**2))) if n else None
    result["mae"] = float(np.mean(np.abs(error))) if n else None
    result["bias"] = float(np.mean(error)) if n else None
    if not n:
        reasons |= dict.fromkeys(("rmse", "mae", "bias"), "no row has a score")
    return {"n": n, **result, "reasons": reasons}


def summarize(
    predicted: Sequence[float | None],
    label: Sequence[float],
    groups: Sequence[str],
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """:func:`correlations` of the rows that have a prediction, with 95 % intervals.

    Args:
        predicted: n predictions, None (or not finite) where there is none.
        label: n labels.
        groups: n prompt ids. Responses to one prompt resemble each other, so whole prompts are resampled.
        bootstrap: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        The keys of :func:`correlations`, with ``n`` all rows, and: ``n_scored``, ``no_score`` (rows without a
        prediction), ``ci95`` (``{"pearson": [low, high] or None, ...}``, percentile bootstrap, also of ``rmse``) and
        ``constant_resamples`` (resamples left out per statistic because it is undefined there). An interval is None
        where more than half of the resamples are left out, or where there is one prompt only.
    """
    if not len(predicted) == len(label) == len(groups):
        raise ValueError(f"the lengths differ: {len(predicted)} predictions, {len(label)} labels, {len(groups)} groups")
    x = np.array([math.nan if p is None else p for p in predicted], dtype=np.float64)
    y = np.asarray(label, dtype=np.float64)
    scored = np.isfinite(x)
    result = correlations(x[scored], y[scored])
    reasons = result.pop("reasons")
    n_scored = int(scored.sum())
    result |= {"n": len(x), "n_scored": n_scored, "no_score": len(x) - n_scored}

    names, group = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    intervals: dict[str, list[float] | None] = dict.fromkeys(WITH_INTERVALS)
    left_out: dict[str, int] = dict.fromkeys(WITH_INTERVALS, 0)
    possible = [name for name in WITH_INTERVALS if result[name] is not None]
    if len(names) < 2:
        reasons["ci95"] = "an interval needs at least two prompts to resample"
    elif possible:
        samples = resample(x, y, group, len(names), bootstrap, seed)
        for name in possible:
            values = [s[name] for s in samples if s[name] is not None]
            left_out[name] = bootstrap - len(values)
            if 2 * left_out[name] > bootstrap:
                reasons[f"ci95.{name}"] = f"{left_out[name]} of {bootstrap} resamples are constant or too small"
            else:
                intervals[name] = [float(v) for v in np.percentile(values, [2.5, 97.5])]
    return {**result, "ci95": intervals, "constant_resamples": left_out, "reasons": reasons}


def calibration(distribution: ArrayLike, values: ArrayLike, labels: ArrayLike, bins: int = 10) -> dict[str, Any]:
    """Does an expected score of 3.7 mean a label of 3.7 on average?

    Args:
        distribution: [n, K] probabilities of the scores; rows may sum to less than 1 (mass off the scale).
        values: [K] the scores.
        labels: [n] labels.
        bins: Most bins. They hold about equally many rows, at least 5 each; equal predictions share a bin.

    Returns:
        ``bins``: from low to high, each with ``n``, ``predicted`` and ``label`` (means of expected score and label) and
        ``label_se`` (standard error of the mean label, None for one row); ``error``: mean of |predicted - label| over
        bins, weighted by rows, None for no rows; ``label_probability``: mean probability of the score nearest to
        the label (of both, averaged, where two are equally near), None for no rows.

    Raises:
        ValueError: Shapes do not fit.
    """
    p, k, y = (np.asarray(a, dtype=np.float64) for a in (distribution, values, labels))
    if len(y) == 0:
        return {"bins": [], "error": None, "label_probability": None}
    if p.shape != (len(y), len(k)):
        raise ValueError(f"distribution has shape {p.shape}, not {(len(y), len(k))} for the labels and scores")
    expected = p @ k
    count = max(1, min(bins, len(y) // 5))
    edges = np.unique(np.quantile(expected, np.linspace(0, 1, count + 1)[1:-1]))
    place = np.searchsorted(edges, expected, side="left")
    found: list[dict[str, Any]] = []
    for b in np.unique(place):
        inside = y[place == b]
        se = float(np.std(inside, ddof=1) / math.sqrt(len(inside))) if len(inside) > 1 else None
        mean = float(np.mean(expected[place == b]))
        found.append({"n": len(inside), "predicted": mean, "label": float(np.mean(inside)), "label_se": se})
    distance = np.abs(y[:, None] - k[None, :])
    near = np.isclose(distance, distance.min(axis=1, keepdims=True), rtol=0, atol=1e-9)
    return {
        "bins": found,
        "error": sum(b["n"] * abs(b["predicted"] - b["label"]) for b in found) / len(y),
        "label_probability": float(np.mean((p * near).sum(axis=1) / near.sum(axis=1))),
    }


def table(summary: dict[str, Any]) -> str:
    """A summary of :func:`real_fast.evaluation.run.evaluate` for people: RAIL and decoded, with intervals."""

    def cell(result: dict[str, Any], name: str) -> str:
        value, interval = result[name], result["ci95"].get(name)
        if value is None:
            return f"none: {result['reasons'].get(name, '')}"
        return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")

    both = (summary, summary["decoded"])
    heading = "written" if summary.get("protocol") == "decode" else "RAIL"
    lines = [("", heading, "decoded"), ("rows with a score", *(f"{r['n_scored']} of {r['n']}" for r in both))]
    lines += [(name, *(cell(r, name) for r in both)) for name in (*WITH_INTERVALS, "mae", "bias")]
    for name, key in (("off-scale mass", "off_scale_mass"), ("truncated", "truncated")):
        if summary.get(key) is not None:
            lines.append((name, f"{summary[key]:.3f}", ""))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _no_correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> str | None:
    """Why no correlation exists, or None where one does."""
    if len(x) < 3:
        return f"{len(x)} rows with a score: at least 3 are needed"
    for values, what in ((x, "predictions"), (y, "labels")):
        if np.ptp(values) <= _EQUAL * np.max(np.abs(values)):
            return f"all {what} are equal"
    return None


def resample(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    group: NDArray[np.intp],
    n_groups: int,
    count: int,
    seed: int | list[int],
) -> list[dict[str, Any]]:
    """:func:`correlations` of `count` resamples of whole groups; rows without a prediction (NaN) then drop out.

    The same groups and seed draw the same resamples, whatever x and y are.
    """
    rows = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group, minlength=n_groups))[:-1])
    rows = [r[np.isfinite(x[r])] for r in rows]
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        chosen = np.concatenate([rows[g] for g in rng.integers(0, n_groups, n_groups)])
        samples.append(correlations(x[chosen], y[chosen]))
    return samples
