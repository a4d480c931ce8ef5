"""Estimates with intervals, out of the resamples of a statistic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from real_fast.evaluation.metrics import WITH_INTERVALS

# Values of a statistic by name: the estimate, or [resamples] with NaN where it is undefined.
Values = dict[str, float | None]
Samples = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; p is two-sided, for a difference from 0. None where it is undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None


def with_intervals(values: Values, samples: Samples, test: bool = False) -> dict[str, Estimate]:
    """Intervals (and p-values) where at least half of the resamples have the statistic."""
    found = {}
    for name, value in values.items():
        drawn = samples[name][np.isfinite(samples[name])]
        if value is None or not len(drawn) or 2 * len(drawn) < len(samples[name]):
            found[name] = Estimate(value)
            continue
        low, high = (float(v) for v in np.percentile(drawn, [2.5, 97.5]))
        fewer = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
        found[name] = Estimate(value, low, high, min(1.0, 2 * (fewer + 1) / (len(drawn) + 1)) if test else None)
    return found


def minus(a: float | None, b: float | None) -> float | None:
    """a - b, None where either is."""
    return None if a is None or b is None else a - b


def mean_values(values: Sequence[Values]) -> Values:
    """The mean of each statistic, None where one of them is."""
    each = {s: [v[s] for v in values] for s in WITH_INTERVALS}
    return {s: None if None in many else float(np.mean([v for v in many if v is not None])) for s, many in each.items()}


def mean_samples(samples: Sequence[Samples]) -> Samples:
    """Benchmarks are resampled independently; their resamples of one number make one of the average."""
    most = max(len(some["rmse"]) for some in samples)
    if any(len(some["rmse"]) != most for some in samples):  # a benchmark of one prompt has none
        return {s: np.array([]) for s in WITH_INTERVALS}
    return {s: np.mean([some[s] for some in samples], axis=0) for s in WITH_INTERVALS}


def drawn_seeds(runs: Sequence[Samples], seed: int) -> Samples:
    """Resamples of the mean over runs that differ by their seed: each draws as many of the runs, with replacement.

    The draw depends on the number of runs alone, so that runs of two methods with the same seeds, in the same order,
    are drawn in pairs. The variance of a mean of n drawn runs is too small by (n - 1) / n; it is widened by that.

    Args:
        runs: Of each run, [resamples] of every statistic; the same resamples of prompts for all.
        seed: Of the draw.
    """
    n = len(runs)
    if n == 1:
        return runs[0]
    count = len(runs[0]["rmse"])
    picked = np.random.default_rng([seed, n, 1]).integers(0, n, (count, n))
    found = {}
    for name in WITH_INTERVALS:
        each = np.stack([run[name] for run in runs], axis=1)
        drawn = np.take_along_axis(each, picked, axis=1).mean(axis=1)
        mean = each.mean(axis=1)
        found[name] = mean + (drawn - mean) * np.sqrt(n / (n - 1))
    return found
