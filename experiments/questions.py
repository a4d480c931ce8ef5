"""Answers with intervals: the planned test with its correction, and the pairs of methods that the questions ask about.

Resampling and differences are those of ``real-fast compare``: whole prompts and seeds, two methods in one resample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from experiments.settings import Experiment, Question
from real_fast.comparison.bootstrap import mean_samples, mean_values, with_intervals
from real_fast.comparison.compare import AVERAGE
from real_fast.comparison.find import Evaluation
from real_fast.comparison.table import BenchmarkTable

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
        A line per pair, of those whose runs are there; ``holm`` is the corrected p of the Pearson correlation.
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
    """`method` minus `other` on a benchmark, or on the plain average of several."""
    parts = [tables[name].difference(method, other) for name in benchmarks]
    values, samples = (mean_values([v for v, _, _ in parts]), mean_samples([s for _, s, _ in parts]))
    estimates = with_intervals(values, samples, test=True)
    seeds = [len(tables[benchmarks[0]].common_seeds(a, b)) for a, b in ((method, other), (other, method))]
    return {
        "method": method,
        "other": other,
        "benchmark": benchmarks[0] if len(benchmarks) == 1 else AVERAGE,
        "rows": sum(rows for *_, rows in parts),
        "seeds": max(seeds),
        **{name: asdict(estimates[name]) for name in STATISTICS},
    }


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
