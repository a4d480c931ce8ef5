"""Methods against each other on the same rows: estimates with intervals, and paired bootstrap tests of differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from real_fast.comparison.bootstrap import Estimate, mean_samples, mean_values, with_intervals
from real_fast.comparison.find import Evaluation, in_order_of
from real_fast.comparison.table import BenchmarkTable, ResultRow, reference_of

AVERAGE = "average"


def compare(
    evaluations: Sequence[Evaluation],
    baseline: str | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    progress: Callable[[], object] | None = None,
) -> tuple[list[ResultRow], list[str]]:
    """Compare methods on every benchmark, and on their average where there are several.

    All methods of a benchmark are resampled jointly, whole prompts at a time; a difference is that of two methods in
    the same resample. Evaluations of one method and benchmark are runs with other seeds: a statistic is the mean of
    theirs, and each resample also draws from the runs. Numbers are those of the rows that all methods scored, but for
    methods with far fewer scores than the others (:data:`real_fast.comparison.table.MIN_COVERAGE`): these stand on
    their own rows, marked, and are neither reference nor best. A difference's interval is the percentiles', its
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
        found.append(BenchmarkTable(name, some, bootstrap, [seed, place], progress))
        if len(some) > 1 and baseline is not None and baseline not in found[-1].methods:
            notes.append(f"{name} has no evaluation of {baseline}: no differences there")
    notes += [note for table in found for note in table.notes(reference_of(table.values, baseline, table.covered))]
    lines = [line for table in found for line in table.lines(reference_of(table.values, baseline, table.covered))]
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
        same: Evaluation | None = e
        while name in tables and (same := in_order_of(tables[name][0], e)) is None:
            number += 1
            name, same = f"{e.benchmark} [rows {number}]", e
        if name not in tables and number > 1:
            first = tables[e.benchmark][0]
            both = {r["id"] for r in first.rows} & {r["id"] for r in e.rows}
            notes.append(
                f"{e.method} ({e.source}) has other rows or labels of {e.benchmark} than {first.method}: {len(e.rows)} "
                f"and {len(first.rows)} rows, {len(both)} ids in common; it is shown as {name!r} and compared apart"
            )
        assert same is not None
        tables.setdefault(name, []).append(same)
    return tables, notes


def _average(tables: Sequence[BenchmarkTable], baseline: str | None) -> list[ResultRow]:
    """Mean over the benchmarks, of the methods that are on all of them; none for a single benchmark."""
    methods = [m for m in tables[0].methods if all(m in t.methods for t in tables)]
    if len(tables) < 2 or not methods:
        return []
    values = {m: mean_values([t.values[m] for t in tables]) for m in methods}
    covered = [m for m in methods if all(m in t.covered for t in tables)]
    reference = reference_of(values, baseline, covered)
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
        size = sum(t.predicted[method].size for t in tables)
        used = sum(t.used(method) for t in tables)
        about = (AVERAGE, method, "", 0, seeds, rows, size, missing, found)
        lines.append(ResultRow(*about, reference, differences, paired, used, method in covered))
    return lines
