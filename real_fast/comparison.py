"""Methods against each other on the same rows: estimates with intervals, and paired bootstrap tests of differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from real_fast.estimates import (
    Estimate,
    Samples,
    Values,
    drawn_seeds,
    mean_samples,
    mean_values,
    minus,
    with_intervals,
)
from real_fast.evaluations import Evaluation
from real_fast.metrics import WITH_INTERVALS, correlations, resample

AVERAGE = "average"


@dataclass(frozen=True)
class Line:
    """A method on a benchmark.

    Attributes:
        benchmark: Its name; :data:`AVERAGE` for the mean over all of them.
        method: Its name.
        protocol: See :mod:`real_fast.protocol`; empty for the average, as feedbacks is 0.
        feedbacks: Feedbacks per row.
        seeds: Runs that differ by their seed; estimates are means over them.
        rows: Number of rows.
        no_score: Predictions that are missing, over all seeds; they count in no statistic.
        estimates: By statistic of :data:`real_fast.metrics.WITH_INTERVALS`.
        reference: The method that it is compared with, itself for the reference; None where there is none.
        differences: This method minus the reference, on the rows that both have scored; empty for the reference.
        paired_rows: How many these are.
    """

    benchmark: str
    method: str
    protocol: str
    feedbacks: int
    seeds: int
    rows: int
    no_score: int
    estimates: dict[str, Estimate]
    reference: str | None = None
    differences: dict[str, Estimate] = field(default_factory=dict)
    paired_rows: int = 0


def compare(
    evaluations: Sequence[Evaluation],
    baseline: str | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    progress: Callable[[], object] | None = None,
) -> tuple[list[Line], list[str]]:
    """Compare methods on every benchmark, and on their average where there are several.

    All methods of a benchmark are resampled jointly, whole prompts at a time; a difference is that of two methods in
    the same resample. Evaluations of one method and benchmark are runs with other seeds: a statistic is the mean of
    theirs, and each resample also draws from the runs. A difference's interval is the percentiles', its
    p-value twice the share of resamples on the side of 0 that has fewer, each side counted once more than seen.

    Args:
        evaluations: Of one benchmark with other rows or labels than the first, an evaluation is compared apart.
        baseline: Method that the others are compared with; None takes the one with the highest Pearson correlation.
        bootstrap: Resamples.
        seed: Of the resampling.
        progress: Called after every evaluation.

    Returns:
        A line per method and benchmark, and sentences about what could not be compared.

    Raises:
        ValueError: No evaluation is of the method `baseline`.
    """
    if baseline is not None and baseline not in {e.method for e in evaluations}:
        known = ", ".join(dict.fromkeys(e.method for e in evaluations))
        raise ValueError(f"there is no evaluation of the baseline {baseline!r}: the methods are {known}")
    tables, notes = _tables(evaluations)
    found = []
    for place, (name, some) in enumerate(tables.items()):
        found.append(_Table(name, some, bootstrap, [seed, place], progress))
        if len(some) > 1 and baseline is not None and baseline not in found[-1].methods:
            notes.append(f"{name} has no evaluation of {baseline}: no differences there")
    lines = [line for table in found for line in table.lines(_reference(table.values, baseline))]
    whole = [table for table in found if table.name in {e.benchmark for e in evaluations}]
    average = _average(whole, baseline)
    partly = [m for m in dict.fromkeys(e.method for e in evaluations) if m not in {line.method for line in average}]
    if len(whole) > 1 and partly:
        notes.append(f"no average for {', '.join(partly)}: not on the same rows as the others on every benchmark")
    return lines + average, notes


def _tables(evaluations: Sequence[Evaluation]) -> tuple[dict[str, list[Evaluation]], list[str]]:
    """Evaluations of the very same rows by benchmark; those of other rows under a name of their own, with a note."""
    tables: dict[str, list[Evaluation]] = {}
    notes = []
    for e in evaluations:
        name, number = e.benchmark, 1
        while name in tables and not _same_rows(tables[name][0], e):
            number += 1
            name = f"{e.benchmark} [rows {number}]"
        if name not in tables and number > 1:
            first = tables[e.benchmark][0]
            both = {r["id"] for r in first.rows} & {r["id"] for r in e.rows}
            notes.append(
                f"{e.method} ({e.source}) has other rows or labels of {e.benchmark} than {first.method}: {len(e.rows)} "
                f"and {len(first.rows)} rows, {len(both)} ids in common; it is shown as {name!r} and compared apart"
            )
        tables.setdefault(name, []).append(e)
    return tables, notes


def _same_rows(a: Evaluation, b: Evaluation) -> bool:
    keys = ("id", "prompt_id", "label")
    return [[row[k] for k in keys] for row in a.rows] == [[row[k] for k in keys] for row in b.rows]


class _Table:
    """The methods of one benchmark, resampled jointly."""

    def __init__(
        self,
        name: str,
        evaluations: Sequence[Evaluation],
        bootstrap: int,
        seed: list[int],
        progress: Callable[[], object] | None,
    ) -> None:
        rows = evaluations[0].rows
        self.name = name
        self.methods: dict[str, list[Evaluation]] = {}
        for e in evaluations:
            self.methods.setdefault(e.method, []).append(e)
        self.label = np.array([row["label"] for row in rows], dtype=np.float64)
        self.group = np.unique([str(row["prompt_id"]) for row in rows], return_inverse=True)[1]
        self.bootstrap, self.seed = bootstrap, seed
        self.predicted = {
            method: np.array([[np.nan if r["prediction"] is None else r["prediction"] for r in e.rows] for e in runs])
            for method, runs in self.methods.items()
        }  # [seeds, rows]
        self.values: dict[str, Values] = {}
        self.samples: dict[str, Samples] = {}
        for method, x in self.predicted.items():
            self.values[method], self.samples[method] = self._mean(x, progress)

    def _mean(self, x: NDArray[np.float64], progress: Callable[[], object] | None = None) -> tuple[Values, Samples]:
        """Statistics of the mean over runs, [seeds, rows]."""
        found = []
        for run in x:
            found.append(self._statistics(run))
            if progress is not None:
                progress()
        return mean_values([v for v, _ in found]), drawn_seeds([s for _, s in found], self.seed[0])

    def _statistics(self, x: NDArray[np.float64]) -> tuple[Values, Samples]:
        scored = np.isfinite(x)
        values = correlations(x[scored], self.label[scored])
        groups = int(self.group.max()) + 1
        drawn = resample(x, self.label, self.group, groups, self.bootstrap, self.seed) if groups > 1 else []
        samples = {s: np.array([d[s] for d in drawn], dtype=np.float64) for s in WITH_INTERVALS}
        return {s: values[s] for s in WITH_INTERVALS}, samples

    def difference(self, method: str, reference: str) -> tuple[Values, Samples, int]:
        """Statistics of `method` minus those of `reference`, on the rows that both have scored; the count of these."""
        both = np.isfinite(self.predicted[method]).all(0) & np.isfinite(self.predicted[reference]).all(0)
        sides = []
        for name in (method, reference):
            x = self.predicted[name]
            whole = bool((np.isfinite(x) == both).all())
            sides.append((self.values[name], self.samples[name]) if whole else self._mean(np.where(both, x, np.nan)))
        (a, a_samples), (b, b_samples) = sides
        samples = {s: a_samples[s] - b_samples[s] for s in WITH_INTERVALS}
        return {s: minus(a[s], b[s]) for s in WITH_INTERVALS}, samples, int(both.sum())

    def lines(self, reference: str | None) -> list[Line]:
        found = []
        for method, runs in self.methods.items():
            x = self.predicted[method]
            differences: dict[str, Estimate] = {}
            paired = 0
            if reference not in (None, method):
                values, samples, paired = self.difference(method, str(reference))
                differences = with_intervals(values, samples, test=True)
            found.append(
                Line(
                    self.name,
                    method,
                    runs[0].protocol,
                    runs[0].feedbacks,
                    len(runs),
                    x.shape[1],
                    int((~np.isfinite(x)).sum()),
                    with_intervals(self.values[method], self.samples[method]),
                    reference,
                    differences,
                    paired,
                )
            )
        return found


def _average(tables: Sequence[_Table], baseline: str | None) -> list[Line]:
    """Mean over the benchmarks, of the methods that are on all of them; none for a single benchmark."""
    methods = [m for m in tables[0].methods if all(m in t.methods for t in tables)]
    if len(tables) < 2 or not methods:
        return []
    values = {m: mean_values([t.values[m] for t in tables]) for m in methods}
    reference = _reference(values, baseline)
    lines = []
    for method in methods:
        samples = mean_samples([t.samples[method] for t in tables])
        missing = sum(int((~np.isfinite(t.predicted[method])).sum()) for t in tables)
        differences: dict[str, Estimate] = {}
        paired = 0
        if reference not in (None, method):
            parts = [t.difference(method, str(reference)) for t in tables]
            paired = sum(rows for *_, rows in parts)
            differences = with_intervals(
                mean_values([v for v, _, _ in parts]), mean_samples([s for _, s, _ in parts]), test=True
            )
        rows, seeds = sum(len(t.label) for t in tables), min(len(t.methods[method]) for t in tables)
        found = with_intervals(values[method], samples)
        lines.append(Line(AVERAGE, method, "", 0, seeds, rows, missing, found, reference, differences, paired))
    return lines


def _reference(values: Mapping[str, Values], baseline: str | None) -> str | None:
    """The baseline, or the method with the highest Pearson correlation; None where there is nothing to compare."""
    if len(values) < 2:
        return None
    if baseline is not None:
        return baseline if baseline in values else None
    known = {m: p for m, v in values.items() if (p := v["pearson"]) is not None}
    return max(known, key=lambda m: known[m]) if known else None
