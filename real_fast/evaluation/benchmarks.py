"""An evaluation on one benchmark, and several of them with their plain average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from real_fast.evaluation.metrics import table

_SUMS = ("seconds",)  # beside the counts, which are whole numbers


@dataclass
class EvalResult:
    """An evaluation: one dictionary a row in `predictions` (in the order of the rows), and their `summary`."""

    predictions: list[dict[str, Any]]
    summary: dict[str, Any]


def together(results: Mapping[str, EvalResult]) -> EvalResult:
    """The evaluations of several benchmarks as one.

    Returns:
        `predictions`: all rows, each with its ``benchmark``. `summary`: the keys of a single benchmark's, where a
        metric is the plain mean of the benchmarks' (each counts the same, however many rows it has; None where one has
        none), a count their sum, and intervals are left out; and ``benchmarks``, every one's own summary by name.
    """
    predictions = [{**p, "benchmark": name} for name, result in results.items() for p in result.predictions]
    summaries = {name: result.summary for name, result in results.items()}
    return EvalResult(predictions, {**_average(summaries), "benchmarks": summaries})


def _average(summaries: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in next(iter(summaries.values())):
        values = {name: summary[key] for name, summary in summaries.items()}
        if key == "reasons":
            found[key] = {what: f"{name}: {why}" for name, reasons in values.items() for what, why in reasons.items()}
        elif key in ("ci95", "constant_resamples"):
            found[key] = {}
        else:
            found[key] = _joined(key, values)
    return found


def _joined(key: str, values: Mapping[str, Any]) -> Any:
    each = list(values.values())
    if all(isinstance(value, dict) for value in each):
        return _average(values)
    if any(value is None for value in each):
        return None
    if key in _SUMS or all(isinstance(value, int) for value in each):
        return sum(each)
    if all(isinstance(value, int | float) for value in each):
        return sum(each) / len(each)
    return each[0]  # the protocol, which is one for all


def tables(summary: dict[str, Any]) -> str:
    """A summary for people: one table, or one for each benchmark and for their average."""
    several: dict[str, dict[str, Any]] = summary.get("benchmarks", {})
    parts: Sequence[tuple[str, dict[str, Any]]] = [*several.items(), (f"average of {len(several)} benchmarks", summary)]
    return "\n\n".join(f"{name}\n{table(one)}" for name, one in parts) if several else table(summary)


def by_benchmark(predictions: Sequence[dict[str, Any]], name: str) -> dict[str, list[dict[str, Any]]]:
    """Predictions of each benchmark; all under `name` where there is one benchmark alone."""
    found: dict[str, list[dict[str, Any]]] = {}
    for p in predictions:
        found.setdefault(p.get("benchmark", name), []).append(p)
    return found
