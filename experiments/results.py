"""From the files of finished runs to summary.json, the table and the figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experiments import baselines, cost, honesty, questions, record
from experiments.duplicates import nearest
from experiments.questions import Tables
from experiments.settings import Experiment, Question, protocol_of
from real_fast.comparison.find import Evaluation
from real_fast.comparison.plot import comparison_plot
from real_fast.comparison.table import reference_of
from real_fast.comparison.text import csv_text, markdown
from real_fast.errors import OutputError
from real_fast.evaluation.metrics import correlations
from real_fast.utils.jsonio import clean, read_jsonl, write_json

STATISTICS = ("pearson", "spearman", "kendall", "rmse", "n")
_BOOTSTRAP = 2000
_FEWEST_PROMPTS = 5
_ABOUT = (
    "updates", "rows_seen", "tokens_sampled", "training_cpu_seconds", "grading_cpu_seconds", "off_scale_mass",
    "truncated", "mean_length", "zero_spread", "score_entropy", "kl", "weights", "start_weights",
)  # fmt: skip
Row = dict[str, Any]


def write(experiment: Experiment, rows: Path, results: Path) -> str:
    """Write summary.json, comparison.md, comparison.csv and comparison.png of the finished runs.

    Args:
        experiment: The experiment.
        rows: Folder of the prepared rows.
        results: Where the runs' files are, and where to write.

    Returns:
        The table, as Markdown.

    Raises:
        OutputError: No run is finished, or one was made with other settings or rows.
    """
    runs = record.read(experiment, results, rows)
    if not runs:
        raise OutputError(f"{results} has no finished run yet: nothing to write")
    graded = {name: read_jsonl(rows / f"test-{name}.jsonl") for name in experiment.data.sources}
    missing = [f"{method}-{seed}" for method, seed in experiment.order() if (method, seed) not in runs]
    found = evaluations(experiment, runs, graded)
    shame = without_a_model(experiment, rows, graded)
    tables = questions.tables_of([*found, *shame], _BOOTSTRAP)
    again = repeated(experiment, rows, graded)
    others = [without(e, again[e.benchmark]) for e in [*found, *shame] if e.benchmark in again]
    machines = [json.loads(m) for m in dict.fromkeys(json.dumps(r["machine"], sort_keys=True) for r in runs.values())]
    search = results / "search.json"
    summary = {
        "results": [_statistics(e) for e in [*found, *shame]],
        # All of the planned resamples once all runs are there: a quarter of an hour.
        "primary": questions.primary(experiment, found, _BOOTSTRAP if missing else experiment.primary.resamples),
        "primary_by_rows": questions.primary(experiment, [by_rows(e) for e in found], _BOOTSTRAP),
        "primary_other_texts": questions.primary(experiment, others, _BOOTSTRAP),
        "other_texts": [_statistics(e) for e in others],
        "repeated": {name: len(ids) for name, ids in again.items()},
        "questions": {name: questions.answers(q, tables) for name, q in experiment.questions.items()},
        "honesty": honest(experiment, runs, rows),
        "averaged": averaged(experiment, runs, rows),
        "cost": cost.costs(experiment, runs),
        "curves": cost.curves(runs),
        "raters": {name: agree for name, some in graded.items() if (agree := baselines.raters(some))},
        "search": json.loads(search.read_text(encoding="utf-8")) if search.is_file() else {},
        "missing": missing,
        "reduced": experiment.reduced,
        "rows": json.loads((rows / "split.json").read_text(encoding="utf-8"))["counts"],
        "runs": {f"{m}-{seed}": {key: run[key] for key in _ABOUT} for (m, seed), run in runs.items()},
        "machines": machines,
        "settings": {k: v for k, v in asdict(experiment).items() if k not in ("reduced", "beside")},
    }
    write_json(results / "summary.json", clean(summary))
    return write_table(tables, experiment.baseline, missing, results)


def write_table(tables: Tables, baseline: str, missing: Sequence[str], results: Path) -> str:
    """Write comparison.md, comparison.csv and comparison.png; returns the table, as Markdown."""
    lines, notes = [], []
    for table in tables.values():
        reference = reference_of(table.values, baseline if baseline in table.methods else None, table.covered)
        lines += table.lines(reference)
        notes += table.notes(reference)
    if missing:
        notes.append(f"not finished, and not in the table: {', '.join(missing)}")
    known = baseline if all(baseline in table.methods for table in tables.values()) else None
    text = markdown(lines, notes, _BOOTSTRAP, known)
    (results / "comparison.md").write_text(text, encoding="utf-8")
    (results / "comparison.csv").write_text(csv_text(lines), encoding="utf-8")
    comparison_plot(lines, results / "comparison.png")
    return text


def evaluations(
    experiment: Experiment, runs: dict[tuple[str, int], dict[str, Any]], graded: dict[str, list[Row]]
) -> list[Evaluation]:
    """Predictions of every finished run, by the benchmarks that its method is graded on.

    What is not trained has no seed, so that it is compared with all of another method's.
    """
    found = []
    for (method, number), run in runs.items():
        seed = number if run["updates"] else None
        for benchmark in experiment.graded_on(method):
            rows, values = graded[benchmark], {i: p[0] for i, p in run["test"].get(benchmark, {}).items()}
            found.append(evaluation(method, benchmark, rows, values, seed, protocol_of(experiment, method)))
    return found


def evaluation(
    method: str,
    benchmark: str,
    rows: Sequence[Row],
    predictions: dict[str, float | None],
    seed: int | None = None,
    protocol: str = "real",
    feedbacks: int = 1,
) -> Evaluation:
    """Predictions with their labels, as ``real-fast compare`` takes them. Raises OutputError for a row without one.

    Whole prompts are resampled, or rows where the prompts are so few that resampling them says nothing.
    """
    if absent := [row["id"] for row in rows if row["id"] not in predictions]:
        raise OutputError(f"{method}: {len(absent)} rows of {benchmark} have no prediction, such as {absent[0]}")
    unit = "prompt_id" if len({row["prompt_id"] for row in rows}) >= _FEWEST_PROMPTS else "id"
    made = [
        {"id": r["id"], "prompt_id": r[unit], "label": r["score"], "prediction": predictions[r["id"]]} for r in rows
    ]
    return Evaluation(method, benchmark, protocol, feedbacks, made, Path(), Path(), seed)


def by_rows(e: Evaluation) -> Evaluation:
    """The same, of which rows are resampled: what is said of these prompts, not of others like them."""
    return replace(e, rows=[{**row, "prompt_id": row["id"]} for row in e.rows])


def repeated(experiment: Experiment, rows: Path, graded: dict[str, list[Row]]) -> dict[str, set[str]]:
    """Ids of graded rows whose text nearly is a training row's, by benchmark of the planned test.

    "No submission.", say: whoever learned that text by heart knows their score.
    """
    found: dict[str, set[str]] = {}
    for name in experiment.primary.benchmarks:
        one, file = experiment.data.sources[name], rows / f"train-{name}.jsonl"
        train = read_jsonl(file) if file.is_file() else []
        mine, theirs = ([" ".join(row[key] for key in one.near) for row in some] for some in (graded[name], train))
        closest = nearest(mine, theirs) if one.near else []
        alike = [row["id"] for row, (_, c) in zip(graded[name], closest, strict=False) if c >= experiment.data.near]
        found[name] = set(alike)
    return found


def without(e: Evaluation, ids: set[str]) -> Evaluation:
    """The same without some of the rows."""
    return replace(e, rows=[row for row in e.rows if row["id"] not in ids])


def without_a_model(experiment: Experiment, rows: Path, graded: dict[str, list[Row]]) -> list[Evaluation]:
    """The baselines, fitted on the training rows of the benchmark's own file, or on all where it has none."""
    sources = experiment.data.sources
    train = {name: read_jsonl(rows / f"train-{name}.jsonl") for name in experiment.data.trained}
    found = []
    for benchmark, some in graded.items():
        own = [row for name in train if sources[name].file == sources[benchmark].file for row in train[name]]
        known = own or [row for part in train.values() for row in part]
        for method, values in baselines.predictions(known, some).items():
            made: dict[str, float | None] = {row["id"]: value for row, value in zip(some, values, strict=True)}
            found.append(evaluation(method, benchmark, some, made, protocol="no model"))
    return found


def honest(experiment: Experiment, runs: dict[tuple[str, int], dict[str, Any]], rows: Path) -> list[dict[str, Any]]:
    """Calibration and intervals of every method, the mean over its seeds, on what has dev rows."""
    values = experiment.common.get("scale", {}).get("values", [1, 2, 3, 4, 5])
    found = []
    for benchmark in experiment.data.trained:
        dev, test = (read_jsonl(rows / f"{part}-{benchmark}.jsonl") for part in ("dev", "test"))
        for method in (m for m in experiment.methods if benchmark in experiment.graded_on(m)):
            each = []
            for run in (run for (name, _), run in runs.items() if name == method):
                known = honesty.arrays(run["dev"][benchmark], dev), honesty.arrays(run["test"][benchmark], test)
                if known[0] is not None and known[1] is not None:
                    each.append(honesty.honesty(values, known[0], known[1]))
            if each:
                mean = {key: sum(one[key] or 0.0 for one in each) / len(each) for key in each[0]}
                found.append({"benchmark": benchmark, "method": method, "runs": len(each), **mean})
    return found


def averaged(experiment: Experiment, runs: dict[tuple[str, int], dict[str, Any]], rows: Path) -> dict[str, Any]:
    """Means over several sampled feedbacks against a single one, on some rows of the primary test's benchmarks.

    Returns:
        ``values`` of every method and number of feedbacks, and ``differences`` from the first number.
    """
    plan = experiment.averaged
    found: list[Evaluation] = []
    for (method, seed), run in runs.items():
        for n, predictions in run["averaged"].items():
            for benchmark, made in predictions.items():
                some = read_jsonl(rows / f"averaged-{benchmark}.jsonl")
                values = {i: p[0] for i, p in made.items()}
                found.append(evaluation(f"{method}, n = {n}", benchmark, some, values, seed, feedbacks=int(n)))
    if not found:
        return {}
    first, *more = plan.feedbacks
    pairs = [[f"{m}, n = {n}", f"{m}, n = {first}"] for m in plan.methods for n in more]
    tables = questions.tables_of(found, _BOOTSTRAP)
    return {
        "values": [
            {"benchmark": name, "method": method, **table.values[method]}
            for name, table in tables.items()
            for method in table.methods
        ],
        "differences": questions.answers(Question(experiment.primary.benchmarks, pairs), tables),
    }


def _statistics(e: Evaluation) -> dict[str, Any]:
    """One line of the results."""
    scored = [(row["prediction"], row["label"]) for row in e.rows if row["prediction"] is not None]
    values = correlations([p for p, _ in scored], [y for _, y in scored])
    about = {"method": e.method, "benchmark": e.benchmark, "seed": e.seed}
    return about | {name: values[name] for name in STATISTICS} | {"no_score": len(e.rows) - len(scored)}
