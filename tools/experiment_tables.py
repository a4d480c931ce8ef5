"""Tables of the experiment, out of what ``make experiment`` left in experiments/; what is not run yet says so."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

_SHOWN = {"pearson": "Pearson", "rmse": "RMSE"}
_DIFFERENCES = {"pearson": "Δ Pearson", "spearman": "Δ Spearman", "rmse": "Δ RMSE"}
NOT_YET = "Not run yet."
Line = dict[str, Any]


def tables(results: Path) -> dict[str, str]:
    """The tables by their markers' names, of `results`, a folder that the experiment wrote."""
    summary = _json(results / "summary.json")
    search, timing, noises = (_json(results / f"{name}.json") for name in ("search", "timing", "noise"))
    bigger = results / "one-size-up" / "comparison.md"
    # The page that has it speaks of the small one until the large one is finished.
    newest = results if summary and not summary["missing"] else results / "small"
    makers: dict[str, Callable[[Any], str]] = {
        "experiment-reduced": lambda s: "\n".join(f"- {line}" for line in s["reduced"]),
        "experiment-rows": lambda s: rows_table(s["rows"]),
        "experiment-primary": lambda s: differences(s["primary"]),
        "experiment-primary-rows": lambda s: differences(s["primary_by_rows"]),
        "experiment-other-texts": lambda s: other_texts(s["other_texts"], s["repeated"], s["rows"]),
        "experiment-primary-other-texts": lambda s: differences(s["primary_other_texts"]),
        "experiment-without-a-model": lambda s: answers(s, "without_a_model"),
        "experiment-comparison": lambda s: (results / "comparison.md").read_text(encoding="utf-8").strip(),
        "experiment-seeds": lambda s: per_seed(s["results"]),
        "experiment-label-only": lambda s: answers(s, "label_only"),
        "experiment-halves": lambda s: answers(s, "halves"),
        "experiment-remedies": lambda s: answers(s, "remedies"),
        "experiment-elsewhere": lambda s: answers(s, "elsewhere", "one_task"),
        "experiment-honesty": lambda s: honesty(s["honesty"]),
        "experiment-averaged": lambda s: averaged(s["averaged"]),
        "experiment-cost": lambda s: cost(s["cost"]),
        "experiment-raters": lambda s: raters(s["raters"]),
        "experiment-runs": lambda s: runs_table(s["runs"], s["machines"]),
    }
    made = {name: make(summary) if summary else NOT_YET for name, make in makers.items()}
    return made | {
        "experiment": methods(_csv(newest / "comparison.csv"), _SHOWN),
        "experiment-search": rates(search, summary) if search else NOT_YET,
        "experiment-timing": timing_table(timing) if timing else NOT_YET,
        "experiment-noise": noise_table(noises) if noises else NOT_YET,
        "experiment-bigger": bigger.read_text(encoding="utf-8").strip() if bigger.is_file() else NOT_YET,
    }


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _csv(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def methods(lines: list[dict[str, str]], statistics: dict[str, str]) -> str:
    """One row per method: statistics on every benchmark with 95 % intervals, the mean over seeds."""
    benchmarks = list(dict.fromkeys(line["benchmark"] for line in lines))
    rows = []
    for method in dict.fromkeys(line["method"] for line in lines):
        mine = {(line["benchmark"], line["statistic"]): line for line in lines if line["method"] == method}
        cells = [interval(mine.get((b, s))) for b in benchmarks for s in statistics]
        rows.append([f"`{method}`", next(iter(mine.values()))["seeds"], *cells])
    return _table(["method", "seeds", *[f"{b}: {what}" for b in benchmarks for what in statistics.values()]], rows)


def interval(line: dict[str, str] | None) -> str:
    """A number of the comparison's CSV with its interval."""
    if not line or not line["value"]:
        return "-"
    ends = f" [{float(line['low']):.2f}, {float(line['high']):.2f}]" if line["low"] else ""
    return f"{float(line['value']):.2f}{ends}"


def differences(found: list[Line]) -> str:
    """Pairs of methods with their intervals, p and Holm's p."""
    rows = []
    for line in found:
        cells = []
        for name in _DIFFERENCES:
            e = line[name]
            known = None not in (e["value"], e["low"])
            cells.append(f"{e['value']:+.3f} [{e['low']:+.3f}, {e['high']:+.3f}]" if known else "-")
        ps = [_number(p, 4) for p in (line["pearson"]["p"], line["holm"])]
        seeds = f"{_number(line['above'], 0)} of {line['seeds']}"
        about = [line["benchmark"], f"`{line['method']}` − `{line['other']}`", str(line["rows"])]
        rows.append([*about, *cells, seeds, *ps])
    heads = ["benchmark", "difference", "rows", *_DIFFERENCES.values(), "seeds with Δ Pearson > 0"]
    heads += ["p (Pearson)", "Holm's p"]
    return _table(heads, rows) if rows else NOT_YET


def answers(summary: Line, *questions: str) -> str:
    """The pairs of methods that some questions ask about."""
    return differences([line for name in questions for line in summary["questions"].get(name, [])])


def other_texts(results: list[Line], repeated: dict[str, int], counts: dict[str, Line]) -> str:
    """Pearson correlations on graded rows whose text was not trained on, the mean over seeds."""
    benchmarks = list(dict.fromkeys(r["benchmark"] for r in results))
    rows = []
    for method in dict.fromkeys(r["method"] for r in results):
        each = [[r["pearson"] for r in results if (r["method"], r["benchmark"]) == (method, b)] for b in benchmarks]
        means = [None if None in some or not some else sum(some) / len(some) for some in each]
        average = None if None in means else sum(m for m in means if m is not None) / len(means)
        rows.append([f"`{method}`", *(_number(m) for m in [*means, average])])
    heads = [f"{b}: {counts[b]['test'] - repeated[b]} of {counts[b]['test']} rows" for b in benchmarks]
    return _table(["Pearson", *heads, "average"], rows)


def per_seed(results: list[Line]) -> str:
    """Pearson correlation and RMSE of every seed."""
    benchmarks = list(dict.fromkeys(r["benchmark"] for r in results))
    rows = []
    for method in dict.fromkeys(r["method"] for r in results):
        row = [f"`{method}`"]
        for benchmark in benchmarks:
            mine = [r for r in results if (r["method"], r["benchmark"]) == (method, benchmark)]
            correlations, errors = (", ".join(_number(r[name]) for r in mine) for name in ("pearson", "rmse"))
            row.append(f"{correlations} ({errors})")
        rows.append(row)
    return _table(["method", *benchmarks], rows) + "\n\nPearson of each seed, in brackets RMSE."


def rows_table(rows: dict[str, Line]) -> str:
    """What became of every file's rows, and the near-duplicates across the split."""
    found, notes = [], []
    for name, counts in rows.items():
        reasons = ", ".join(f"{count} ({reason})" for reason, count in counts["left_out"].items()) or "0"
        graded = f"{counts['test']} of {counts['prompts']}"
        parts = [str(counts[key]) for key in ("shared", "train", "dev")]
        found.append([name, str(counts["rows"]), reasons, *parts, graded])
        for what, near in counts["near"].items():
            examples = "; ".join(" and ".join(pair) for pair in near["examples"][:2])
            dropped = "left out" if near["dropped"] else "kept"
            if near["rows"]:
                notes.append(f"- {name}, {what}: {near['rows']} near-duplicates, {dropped} ({examples})")
    heads = ["source", "rows", "left out", "shared text", "trained on", "dev", "graded rows of prompts"]
    return "\n".join([_table(heads, found), "", *notes])


def honesty(found: list[Line]) -> str:
    """Calibration and intervals, before and after the fit on dev rows."""
    pairs = [("error", "fitted_error"), ("rmse", "fitted_rmse"), ("coverage", "conformal_coverage")]
    pairs.append(("width", "conformal_width"))
    rows = []
    for line in found:
        error, rmse, coverage, width = (f"{_number(line[before])} → {_number(line[after])}" for before, after in pairs)
        about = [line["benchmark"], f"`{line['method']}`", str(line["runs"])]
        rows.append([*about, error, rmse, _number(line["claimed"]), coverage, width])
    heads = ["benchmark", "method", "seeds", "calibration error", "RMSE", "share that the intervals claim"]
    return _table([*heads, "their coverage", "their width"], rows)


def averaged(found: Line) -> str:
    """Means over several feedbacks, and what they gain over one."""
    if not found:
        return NOT_YET
    rows = [
        [
            line["benchmark"],
            f"`{line['method']}`",
            *(_number(line[name], 3) for name in ("pearson", "spearman", "rmse")),
        ]
        for line in found["values"]
    ]
    values = _table(["benchmark", "method", "Pearson", "Spearman", "RMSE"], rows)
    return f"{values}\n\n{differences(found['differences'])}"


def cost(found: list[Line]) -> str:
    """What runs cost in all, and to reach an RMSE on the dev rows."""
    limits = [point["rmse"] for point in found[0]["reach"]] if found else []
    rows = []
    for line in found:
        cells = [
            f"{_costs(point)} ({point['runs']} of {line['runs']})" if point["cpu"] is not None else "-"
            for point in line["reach"]
        ]
        rows.append([f"`{line['method']}`", _costs(line), *cells])
    note = (
        "Rows / thousand sampled tokens / CPU-minutes, starts included: medians over seeds, of which in brackets so "
        "many got there; '-' where half of them did not. A run is there at the evaluation from which on all are as "
        "good. The machines differ, and so do their CPU-minutes for the same work: rows and tokens compare better."
    )
    return _table(["method", "in all", *[f"dev RMSE {limit:g}" for limit in limits]], rows) + f"\n\n{note}"


def _costs(line: Line) -> str:
    return f"{line['rows']:.0f} / {line['tokens'] / 1000:.0f} / {line['cpu'] / 60:.0f}"


def raters(found: dict[str, Line]) -> str:
    """How well raters agree among themselves."""
    rows = [[name, str(r["raters"]), str(r["n"]), _number(r["pearson"])] for name, r in found.items()]
    return _table(["benchmark", "raters", "rows", "one against the mean of the others: Pearson"], rows)


def rates(found: dict[str, list[Line]], summary: Line | None) -> str:
    """The searched learning rates: dev RMSE and Pearson of each, and what the runs then had."""
    settings = summary["settings"] if summary else None
    rows = []
    for method, lines in found.items():
        known = [line for line in lines if line["rmse"] is not None]
        best = min(known, key=lambda line: float(line["rmse"])) if known else None
        cells = []
        for line in lines:
            text = f"{line['lr']:g}: {_number(line['rmse'], 3)} ({_number(line['pearson'])})"
            cells.append(f"**{text}**" if line is best else text)
        own = settings["methods"].get(method, {}) if settings else {}
        taken = own.get("optim", {}).get("lr", settings["common"]["optim"]["lr"]) if settings else None
        rows.append([f"`{method}`", str(lines[0]["updates"]), ", ".join(cells), f"{taken:g}" if taken else "-"])
    return _table(["method", "updates each", "rate: dev RMSE (Pearson)", "rate of the runs"], rows)


def timing_table(found: list[Line]) -> str:
    """What an hour of one core buys."""
    rows = [
        [
            f"`{line['method']}`",
            f"{line['update']:.1f}",
            f"{3600 / line['update']:.0f}" if line["update"] else "-",
            f"{line['row']:.2f}",
            str(line["updates"]),
            f"{line['run'] / 60:.0f}",
            str(line["runs"]),
        ]
        for line in found
    ]
    heads = ["method", "CPU-s an update", "updates an hour", "CPU-s a graded row", "updates of a run", "CPU-min a run"]
    return _table([*heads, "runs"], rows)


def noise_table(found: dict[str, list[Line]]) -> str:
    """Signal and noise of every method's gradient, by the halves of its loss."""
    rows = [
        [
            f"`{method}`",
            line["part"],
            str(line["prompts"]),
            f"{line['norm']:.1f}",
            f"{line['signal']:.3f} [{line['low']:.3f}, {line['high']:.3f}]",
            _number(line["noise_scale"], 0),
        ]
        for method, lines in found.items()
        for line in lines
    ]
    return _table(["method", "part", "prompts a batch", "length", "the signal's share", "noise scale, prompts"], rows)


def runs_table(runs: dict[str, Line], machines: list[Line]) -> str:
    """What the runs saw and took, the mean over seeds; what they start from is not included."""
    columns = {
        "updates": ("updates", 0, 1.0),
        "rows seen": ("rows_seen", 0, 1.0),
        "CPU-min of training": ("training_cpu_seconds", 0, 1 / 60),
        "thousand tokens sampled": ("tokens_sampled", 0, 1 / 1000),
        "feedback tokens": ("mean_length", 0, 1.0),
        "truncated": ("truncated", 2, 1.0),
        "off-scale mass": ("off_scale_mass", 3, 1.0),
        "groups without spread": ("zero_spread", 2, 1.0),
        "score entropy": ("score_entropy", 2, 1.0),
    }
    rows = []
    for method in dict.fromkeys(name.rpartition("-")[0] for name in runs):
        mine = [run for name, run in runs.items() if name.rpartition("-")[0] == method]
        cells = [_mean([run[key] for run in mine], digits, scale) for key, digits, scale in columns.values()]
        rows.append([f"`{method}`", str(len(mine)), *cells, _mean([run["kl"][-1][1] for run in mine if run["kl"]], 3)])
    about = "; ".join(", ".join(f"{k} {v}" for k, v in machine.items()) for machine in machines)
    notes = (
        "Length, truncation and off-scale mass are those on the dev rows; groups without spread and score entropy "
        "(nats) are means over the updates, KL (nats a token) that of the last one."
    )
    known = {run["weights"] for run in runs.values()}
    apart = [name for name, run in runs.items() if run["start_weights"] not in (None, *known)]
    if apart:
        notes += f" Started from a start that was trained again on another machine: {', '.join(apart)}."
    heads = ["method", "seeds", *columns, "KL to the start"]
    return f"{_table(heads, rows)}\n\n{notes} Machine: {about}."


def _mean(values: Sequence[float | None], digits: int, scale: float = 1.0) -> str:
    known = [value for value in values if value is not None]
    return f"{scale * sum(known) / len(known):.{digits}f}" if known else "-"
