"""The methods of one benchmark, resampled jointly: whole prompts, and seeds where a method has several."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from real_fast.comparison.bootstrap import Estimate, Samples, Values, drawn_seeds, mean_values, minus, with_intervals
from real_fast.comparison.find import Evaluation
from real_fast.evaluation.metrics import WITH_INTERVALS, correlations, resample

# Share of the scores of the method with the most that another needs to be compared on the rows of all. A judge that
# answers the easy rows alone would win, and take the others' rows away.
MIN_COVERAGE = 0.9


@dataclass(frozen=True)
class ResultRow:
    """A method on a benchmark.

    Attributes:
        benchmark: Its name; :data:`real_fast.comparison.compare.AVERAGE` for the mean over all of them.
        method: Its name.
        protocol: See :mod:`real_fast.score.protocol`; empty for the average, as feedbacks is 0.
        feedbacks: Feedbacks per row.
        seeds: Runs that differ by their seed; estimates are means over them.
        rows: Number of rows.
        predictions: Of all seeds.
        no_score: How many of them are missing; they count in no statistic.
        estimates: By statistic of :data:`real_fast.evaluation.metrics.WITH_INTERVALS`.
        compared_to: The method that it is compared with, itself for that one; None where there is none.
        differences: This method minus the reference, on the rows that both have scored; empty for the reference.
        paired_rows: How many these are.
        used_rows: Rows that the estimates are of: those that all covered methods scored.
        covered: Whether it has scored enough rows (:data:`MIN_COVERAGE`); where not, the estimates are of its own rows.
    """

    benchmark: str
    method: str
    protocol: str
    feedbacks: int
    seeds: int
    rows: int
    predictions: int
    no_score: int
    estimates: dict[str, Estimate]
    compared_to: str | None = None
    differences: dict[str, Estimate] = field(default_factory=dict)
    paired_rows: int = 0
    used_rows: int = 0
    covered: bool = True

    @property
    def coverage(self) -> float:
        """Share of the rows (of all seeds) that it has scored."""
        return 1 - self.no_score / self.predictions


class BenchmarkTable:
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
        for runs in self.methods.values():
            runs.sort(key=lambda e: -1 if e.seed is None else e.seed)  # drawn_seeds pairs by place
        self.label = np.array([row["label"] for row in rows], dtype=np.float64)
        self.group = np.unique([str(row["prompt_id"]) for row in rows], return_inverse=True)[1]
        self.bootstrap, self.seed = bootstrap, seed
        self.predicted = {
            method: np.array([[np.nan if r["prediction"] is None else r["prediction"] for r in e.rows] for e in runs])
            for method, runs in self.methods.items()
        }  # [seeds, rows]
        scored = {method: np.isfinite(x) for method, x in self.predicted.items()}
        most = max(s.mean() for s in scored.values())
        self.covered = [m for m, s in scored.items() if s.any() and s.mean() >= MIN_COVERAGE * most]
        common = np.logical_and.reduce([scored[m].all(0) for m in self.covered] or [np.ones(len(rows), dtype=bool)])
        self.compared = {
            method: np.where(common, x, np.nan) if method in self.covered else x for method, x in self.predicted.items()
        }  # [seeds, rows], NaN where a row does not count
        self.values: dict[str, Values] = {}
        self.samples: dict[str, Samples] = {}
        for method, x in self.compared.items():
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
        places = {name: self.common_seeds(name, other) for name, other in ((method, reference), (reference, method))}
        both = np.logical_and.reduce([np.isfinite(self.compared[name][mine]).all(0) for name, mine in places.items()])
        sides = []
        for name, mine in places.items():
            x = self.compared[name]
            whole = len(mine) == len(x) and bool((np.isfinite(x) == both).all())
            known = (self.values[name], self.samples[name])
            sides.append(known if whole else self._mean(np.where(both, x[mine], np.nan)))
        (a, a_samples), (b, b_samples) = sides
        samples = {s: a_samples[s] - b_samples[s] for s in WITH_INTERVALS}
        return {s: minus(a[s], b[s]) for s in WITH_INTERVALS}, samples, int(both.sum())

    def common_seeds(self, method: str, other: str) -> list[int]:
        """Places of a method's runs whose seed the other has too; all of them where none is, or one has no seed."""
        mine, theirs = ([e.seed for e in self.methods[name]] for name in (method, other))
        common = set(mine) & set(theirs) - {None}
        if not common:
            return list(range(len(mine)))
        return [place for place, seed in enumerate(mine) if seed in common]

    def used(self, method: str) -> int:
        """Rows that a method's estimates are of, for one seed at least."""
        return int(np.isfinite(self.compared[method]).any(0).sum())

    def notes(self, reference: str | None) -> list[str]:
        """What the numbers do not show of rows and seeds."""
        found = []
        few = {m: _percent(np.isfinite(self.predicted[m]).mean()) for m in self.methods if m not in self.covered}
        if reference in few:  # as the baseline that was asked for
            found.append(
                f"{self.name}: the baseline {reference} has a score for {few.pop(str(reference))} of the rows alone, "
                "so it cannot be best, and every difference from it is of the rows that it and the other method both "
                "scored, perhaps the easier ones: take another baseline, or evaluate it on all rows"
            )
        if few:
            each = ", ".join(f"{method} ({share})" for method, share in few.items())
            found.append(
                f"{self.name}: few rows have a score by {each}, so its numbers are of other rows than the "
                "others'; it is neither reference nor best"
            )
        if len(self.covered) > 1 and (used := self.used(self.covered[0])) < len(self.label):
            found.append(
                f"{self.name}: numbers are of the {used} of {len(self.label)} rows that {', '.join(self.covered)} all "
                "scored"
            )
        for method, runs in self.methods.items():
            pairs = [] if reference is None else [(method, reference), (reference, method)]
            if any(len(self.common_seeds(a, b)) < len(self.methods[a]) for a, b in pairs):
                found.append(f"{self.name}: the difference of {method} and {reference} is that of the seeds of both")
            single = [correlations(x[np.isfinite(x)], self.label[np.isfinite(x)]) for x in self.compared[method]]
            without = [str(e.seed) for e, s in zip(runs, single, strict=True) if s["pearson"] is None]
            if len(runs) > 1 and without:
                found.append(
                    f"{self.name}: {method} has no correlation on seed {', '.join(without)}, and so none on average"
                )
        return found

    def lines(self, reference: str | None) -> list[ResultRow]:
        """A line per method, with its difference from the reference."""
        found = []
        for method, runs in self.methods.items():
            x = self.predicted[method]
            differences: dict[str, Estimate] = {}
            paired = 0
            if reference not in (None, method):
                values, samples, paired = self.difference(method, str(reference))
                differences = with_intervals(values, samples, test=True)
            found.append(
                ResultRow(
                    self.name,
                    method,
                    runs[0].protocol,
                    runs[0].feedbacks,
                    len(runs),
                    x.shape[1],
                    x.size,
                    int((~np.isfinite(x)).sum()),
                    with_intervals(self.values[method], self.samples[method]),
                    reference,
                    differences,
                    paired,
                    self.used(method),
                    method in self.covered,
                )
            )
        return found


def reference_of(values: Mapping[str, Values], baseline: str | None, covered: Collection[str]) -> str | None:
    """The baseline, or the covered method with the highest Pearson correlation; None where nothing can be compared."""
    if len(values) < 2:
        return None
    if baseline is not None:
        return baseline if baseline in values else None
    known = {m: p for m, v in values.items() if m in covered and (p := v["pearson"]) is not None}
    return max(known, key=lambda m: known[m]) if known else None


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
