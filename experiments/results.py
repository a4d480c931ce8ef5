"""From finished runs to summary.json, the table, and the figure."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.settings import Experiment, merged, run_folder
from real_fast.comparison.compare import AVERAGE, compare
from real_fast.comparison.find import Evaluation
from real_fast.comparison.plot import comparison_plot
from real_fast.comparison.text import csv_text, markdown
from real_fast.errors import OutputError
from real_fast.evaluation.metrics import correlations
from real_fast.runs.folder import check_writable
from real_fast.utils.jsonio import read_jsonl, write_json

STATISTICS = ("pearson", "spearman", "kendall", "rmse", "n")
# All held-out prompts of the files that are trained on; the parts are benchmarks of their own too.
IN_DOMAIN = "in_domain"
_BOOTSTRAP = 2000
_TRAINING = ("rollout", "update", "optimizer", "sync", "self_generated")
# Of metrics.jsonl, to say how far a method could learn: means over the updates.
_HEALTH = {"zero_spread": "frac_reward_zero_std", "score_entropy": "score/entropy"}


def write(experiment: Experiment, folder: Path, results: Path) -> str:
    """Write summary.json, predictions.json, comparison.md, comparison.csv and comparison.png of the finished runs.

    predictions.json has every run's prediction of every held-out row by the row's id, and nothing of the rows: with the
    data files beside it, any other statistic can be computed.

    Args:
        experiment: The experiment.
        folder: Its runs.
        results: Where to write.

    Returns:
        The table, as Markdown.

    Raises:
        OutputError: No run is finished, or `results` cannot be written.
    """
    found = evaluations(experiment, folder)
    if not found:
        raise OutputError(f"{folder} has no finished run yet: nothing to write")
    check_writable(results)
    made = {(e.method, e.seed) for e in found}
    finished = [run for run in experiment.order() if run in made]
    missing = [f"{method}-{seed}" for method, seed in experiment.order() if (method, seed) not in made]
    tables = [(e.method, e.benchmark) for e in found if e.benchmark == IN_DOMAIN]
    runs = {f"{method}-{seed}": _about(run_folder(folder, method, seed)) for method, seed in finished}
    machines = {json.dumps(run.pop("machine"), sort_keys=True): None for run in runs.values()}
    write_json(
        results / "summary.json",
        {
            "results": [_statistics(e) for e in found],
            "by_label": [by_label([e for e in found if (e.method, e.benchmark) == m]) for m in dict.fromkeys(tables)],
            "over_starts": over_starts(experiment, [e for e in found if e.benchmark == IN_DOMAIN]),
            "without_a_model": without_a_model(experiment, folder),
            "missing": missing,
            "reduced": experiment.reduced,
            "rows": json.loads((folder / "data" / "split.json").read_text(encoding="utf-8"))["counts"],
            "machines": [json.loads(m) for m in machines],
            "runs": runs,
            "settings": {k: v for k, v in asdict(experiment).items() if k not in ("reduced", "beside")},
        },
    )
    predictions: dict[str, dict[str, float | None]] = {}
    for e in found:
        mine = {row["id"]: row["prediction"] for row in e.rows}
        predictions.setdefault(f"{e.method}-{e.seed}", {}).update(mine)
    write_json(results / "predictions.json", predictions)
    parts = {Path(name).stem for name in experiment.data.train}
    shown = [e for e in found if e.benchmark not in parts]
    return write_table(shown, experiment.baseline, missing, results)


def write_table(found: list[Evaluation], baseline: str, missing: list[str], results: Path) -> str:
    """Write comparison.md, comparison.csv and comparison.png.

    Args:
        found: What is compared.
        baseline: Method that the others are compared with, if it is there.
        missing: Runs of which the table must say that it lacks them.
        results: Where to write.

    Returns:
        The table, as Markdown.
    """
    known = baseline if baseline in {e.method for e in found} else None
    lines, notes = compare(found, known, _BOOTSTRAP)
    lines = [line for line in lines if line.benchmark != AVERAGE]
    if missing:
        notes = [*notes, f"not finished, and not in the table: {', '.join(missing)}"]
    text = markdown(lines, notes, _BOOTSTRAP, known)
    (results / "comparison.md").write_text(text, encoding="utf-8")
    (results / "comparison.csv").write_text(csv_text(lines), encoding="utf-8")
    comparison_plot(lines, results / "comparison.png")
    return text


def evaluations(experiment: Experiment, folder: Path) -> list[Evaluation]:
    """Predictions of every finished run, by benchmark."""
    found = []
    held_out = benchmarks(experiment, folder)
    for method, seed in experiment.order():
        run = run_folder(folder, method, seed)
        file = run / "eval" / "after.predictions.jsonl"
        if not (run / "summary.json").is_file():
            continue
        rows = {row["id"]: row for row in read_jsonl(file)}
        protocol = protocol_of(experiment, method)
        for benchmark, ids in held_out.items():
            if absent := [i for i in ids if i not in rows]:
                raise OutputError(f"{file} has no prediction for {len(absent)} held-out rows, such as {absent[0]}")
            mine = [rows[i] for i in ids]
            found.append(Evaluation(method, benchmark, protocol, int(mine[0].get("n", 1)), mine, file, run, seed))
    return found


def over_starts(experiment: Experiment, found: list[Evaluation]) -> list[dict[str, Any]]:
    """What every method gains over the ones that it started from, in paired resamples; one benchmark's evaluations."""
    made = list(dict.fromkeys(e.method for e in found))
    starts = {method: experiment.starts(method) for method in made}
    gains = {}
    for start in dict.fromkeys(s for method in made for s in starts[method] if s in made):
        family = [e for e in found if e.method == start or start in starts[e.method]]
        for line in compare(family, start, _BOOTSTRAP)[0]:
            if line.method != start:
                gains[line.method, start] = {name: asdict(gain) for name, gain in line.differences.items()}
    pairs = [(method, start) for method in made for start in starts[method] if (method, start) in gains]
    return [{"method": m, "start": s, "benchmark": found[0].benchmark} | gains[m, s] for m, s in pairs]


def protocol_of(experiment: Experiment, method: str) -> str:
    """The protocol that a method's runs are evaluated by."""
    return str(merged(experiment.common, experiment.methods[method]).get("eval", {}).get("protocol", "real"))


def benchmarks(experiment: Experiment, folder: Path) -> dict[str, list[str]]:
    """Ids of the held-out rows by benchmark."""
    split = json.loads((folder / "data" / "split.json").read_text(encoding="utf-8"))["benchmarks"]
    return {IN_DOMAIN: [i for name in experiment.data.train for i in split[Path(name).stem]], **split}


def without_a_model(experiment: Experiment, folder: Path) -> dict[str, dict[str, float | None]]:
    """What the length of a response (in words) says of its label, and the error of the training rows' mean label."""
    train = [row["score"] for row in read_jsonl(folder / "data" / "train.jsonl")]
    rows = {row["id"]: row for row in read_jsonl(folder / "data" / "test.jsonl")}
    found: dict[str, dict[str, float | None]] = {}
    for benchmark, ids in benchmarks(experiment, folder).items():
        labels = [rows[i]["score"] for i in ids]
        length = correlations([len(rows[i]["response"].split()) for i in ids], labels)
        constant = correlations([sum(train) / len(train)] * len(ids), labels)
        found[benchmark] = {
            "length_pearson": length["pearson"],
            "length_spearman": length["spearman"],
            "mean_label_rmse": constant["rmse"],
        }
    return found


def by_label(runs: list[Evaluation]) -> dict[str, Any]:
    """Where on the scale a method errs: its RMSE and mean prediction by label, over all of its runs."""
    bounds = [-math.inf, 2.5, 3.5, 4.5, math.inf]
    parts = []
    for low, high in itertools.pairwise(bounds):
        rows = [r for e in runs for r in e.rows if low <= r["label"] < high and r["prediction"] is not None]
        values = correlations([r["prediction"] for r in rows], [r["label"] for r in rows])
        mean = sum(r["prediction"] for r in rows) / len(rows) if rows else None
        name = f"below {high}" if low == -math.inf else f"{low} and more" if high == math.inf else f"{low} to {high}"
        parts.append({"labels": name, "n": len(rows) // len(runs), "rmse": values["rmse"], "prediction": mean})
    return {"method": runs[0].method, "benchmark": runs[0].benchmark, "parts": parts}


def _statistics(e: Evaluation) -> dict[str, Any]:
    """One line of the results."""
    scored = [(row["prediction"], row["label"]) for row in e.rows if row["prediction"] is not None]
    values = correlations([p for p, _ in scored], [y for _, y in scored])
    about = {"method": e.method, "benchmark": e.benchmark, "seed": e.seed}
    return about | {name: values[name] for name in STATISTICS} | {"no_score": len(e.rows) - len(scored)}


def _about(run: Path) -> dict[str, Any]:
    """What a run saw and took, TRACT's first stage included; the run that it starts from is not."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    stages = [run, run / "stage1"] if (run / "stage1" / "summary.json").is_file() else [run]
    summaries = [json.loads((stage / "summary.json").read_text(encoding="utf-8")) for stage in stages]
    after = summary["eval"]["after"]
    updates = [m for m in read_jsonl(run / "metrics.jsonl") if m["phase"] == summary["method"]]
    return {
        "updates": sum(s["steps"] for s in summaries),
        "rows_seen": sum(_rows_seen(stage, s) for stage, s in zip(stages, summaries, strict=True)),
        "training_seconds": sum(s for each in summaries for part, s in each["seconds"].items() if part in _TRAINING),
        "off_scale_mass": after["off_scale_mass"],
        "truncated": after["truncated"],
        "mean_length": after["mean_length"],
        **{name: _over([m.get(key) for m in updates]) for name, key in _HEALTH.items()},
        "kl": next((m["kl"] for m in reversed(updates) if m.get("kl") is not None), None),
        "machine": summary["machine"],
    }


def _over(values: list[float | None]) -> float | None:
    """Mean of those that were measured."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _rows_seen(run: Path, summary: dict[str, Any]) -> int:
    metrics = [m for m in read_jsonl(run / "metrics.jsonl") if m["phase"] == summary["method"]]
    return round(metrics[-1]["epoch"] * summary["train_rows"]) if metrics else 0
