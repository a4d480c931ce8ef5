"""Answers with intervals: the planned test with its correction, and the pairs of methods that the questions ask about.

Resampling and differences are those of ``real-fast compare``: whole prompts and seeds, two methods in one resample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from experiments.settings import Experiment, Question
from real_fast.comparison.bootstrap import mean_samples, mean_values, minus, with_intervals
from real_fast.comparison.compare import AVERAGE
from real_fast.comparison.find import Evaluation
from real_fast.comparison.table import BenchmarkTable
from real_fast.evaluation.metrics import correlations

STATISTICS = ("pearson", "spearman", "rmse")
Tables = Mapping[str, BenchmarkTable]


def tables_of(evaluations: Sequence[Evaluation], resamples: int) -> dict[str, BenchmarkTable]:
    """The methods of every benchmark, resampled jointly."""
    names = list(dict.fromkeys(e.benchmark for e in evaluations))
    return {
        name: BenchmarkTable(name, [e for e in evaluations if e.benchmark == name], resamples, [0, place], None)
        for place, name in enumerate(names)
    }


def primary(experiment: Experiment, evaluations: Sequence[Evaluation], resamples: int) -> list[dict[str, Any]]:
    """The planned test: the baseline against the others on the average of the benchmarks, p corrected by Holm.

    Returns:
        A line per pair, of those whose runs are there; ``holm`` is the corrected p of the Pearson correlation, and
        ``above`` the number of seeds on which the first method's is the higher one.
    """
    plan = experiment.primary
    methods = {experiment.baseline, *plan.others}
    some = [e for e in evaluations if e.method in methods and e.benchmark in plan.benchmarks]
    tables = tables_of(some, resamples)
    if set(tables) != set(plan.benchmarks):
        return []
    found = [
        difference(tables, plan.benchmarks, experiment.baseline, other)
        for other in plan.others
        if all({experiment.baseline, other} <= set(table.methods) for table in tables.values())
    ]
    return corrected(found)


def answers(question: Question, tables: Tables) -> list[dict[str, Any]]:
    """Every pair on every benchmark, and on their average where there are several; p corrected within each of these."""
    known = [b for b in question.benchmarks if b in tables]
    places = [[b] for b in known] + ([known] if len(known) > 1 else [])
    found = []
    for place in places:
        pairs = [(a, b) for a, b in question.pairs if all({a, b} <= set(tables[name].methods) for name in place)]
        found += corrected([difference(tables, place, a, b) for a, b in pairs])
    return found


def difference(tables: Tables, benchmarks: Sequence[str], method: str, other: str) -> dict[str, Any]:
    """`method` minus `other` on a benchmark, or on the plain average of several.

    One run of a trained method says nothing of what another seed would give, so its interval is one over prompts alone,
    and it has no p.
    """
    parts = [tables[name].difference(method, other) for name in benchmarks]
    values, samples = (mean_values([v for v, _, _ in parts]), mean_samples([s for _, s, _ in parts]))
    each = mean_of_each([_each_seed(tables[name], method, other) for name in benchmarks])
    estimates = with_intervals(values, samples, test=len(each) > 1)
    return {
        "method": method,
        "other": other,
        "benchmark": benchmarks[0] if len(benchmarks) == 1 else AVERAGE,
        "rows": sum(rows for *_, rows in parts),
        "seeds": len(each),
        "above": None if None in each else sum(d > 0 for d in each if d is not None),
        **{name: asdict(estimates[name]) for name in STATISTICS},
    }


def _each_seed(table: BenchmarkTable, method: str, other: str) -> list[float | None]:
    """The difference of the Pearson correlations, seed by seed; what has no seed stands beside each of the other's."""
    sides = []
    for name, against in ((method, other), (other, method)):
        runs = table.compared[name][table.common_seeds(name, against)]
        known = [np.isfinite(run) for run in runs]
        sides.append([correlations(r[k], table.label[k])["pearson"] for r, k in zip(runs, known, strict=True)])
    most = max(map(len, sides))
    a, b = (side * most if len(side) == 1 else side for side in sides)
    return [minus(x, y) for x, y in zip(a, b, strict=True)]


def mean_of_each(benchmarks: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Seed by seed, the mean over benchmarks; None where one of them is."""
    return [None if None in some else sum(v or 0.0 for v in some) / len(some) for some in zip(*benchmarks, strict=True)]


def corrected(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines with ``holm``, the p of the Pearson correlation corrected for their number."""
    ps = [line["pearson"]["p"] for line in lines]
    return [{**line, "holm": p} for line, p in zip(lines, holm(ps), strict=True)]


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's corrected p-values, in the order given; what is None stays so, and counts among those that are tested."""
    order = sorted((i for i, p in enumerate(ps) if p is not None), key=lambda i: ps[i] or 0.0)
    found: list[float | None] = [None] * len(ps)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * (ps[i] or 0.0)))
        found[i] = highest
    return found
