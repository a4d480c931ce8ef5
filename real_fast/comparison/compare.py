"""Methods against each other on the same rows: estimates with intervals, and paired bootstrap tests of differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from real_fast.comparison.bootstrap import Estimate, mean_samples, mean_values, with_intervals
from real_fast.comparison.find import Evaluation, among
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
    their own rows, marked, and are never best, nor reference but as the `baseline`. A difference's interval is the
    percentiles', its p-value twice the share of resamples on the side of 0 that has fewer, each side counted once more
    than seen.

    Args:
        evaluations: Of one benchmark, one that has a part of another's rows is compared with it, and has no score on
            the rest; one with other rows or labels than the first is compared apart.
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
    """Evaluations of the same rows, or of a part of them, by benchmark; those of others under a name of their own."""
    groups: list[dict[int, Evaluation]] = []  # each begins with the one that has all of its rows; by place
    for place, e in sorted(enumerate(evaluations), key=lambda pair: -len(pair[1].rows)):
        for group in groups:
            whole = next(iter(group.values()))
            if whole.benchmark == e.benchmark and (same := among(whole, e)) is not None:
                group[place] = same
                break
        else:
            groups.append({place: e})
    tables: dict[str, list[Evaluation]] = {}
    notes = []
    for group in sorted(groups, key=min):
        first = evaluations[min(group)]
        name, number = first.benchmark, 1
        while name in tables:
            number += 1
            name = f"{first.benchmark} [rows {number}]"
        tables[name] = [e for _, e in sorted(group.items())]
        rows = len(tables[name][0].rows)
        if number > 1:
            other = tables[first.benchmark][0]
            both = {r["id"] for r in other.rows} & {r["id"] for r in tables[name][0].rows}
            notes.append(
                f"{first.method} ({first.source}) has other rows or labels of {first.benchmark} than {other.method}: "
                f"{rows} and {len(other.rows)} rows, {len(both)} ids in common; it is shown as {name!r} and compared "
                "apart"
            )
        asked = {evaluations[place].method: len(evaluations[place].rows) for place in sorted(group)}
        if parts := [f"{method} {some}" for method, some in asked.items() if some < rows]:
            notes.append(
                f"{name}: of its {rows} rows these were asked fewer (max_rows, say), and have no score on the others: "
                + ", ".join(parts)
            )
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
