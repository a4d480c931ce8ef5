"""Tables of the experiment, out of what ``make experiment`` left in experiments/."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

_SHOWN = {"pearson": "Pearson", "rmse": "RMSE"}


def tables(results: Path) -> dict[str, str]:
    """The tables by their markers' names, of `results`, a folder that the experiment wrote."""
    summary = json.loads((results / "summary.json").read_text(encoding="utf-8"))
    made = {
        "experiment": methods(_csv(results / "comparison.csv"), _SHOWN),
        "comparison": (results / "comparison.md").read_text(encoding="utf-8").strip(),
        "reduced": "\n".join(f"- {line}" for line in summary["reduced"]),
        "seeds": per_seed(summary["results"]),
        "starts": starts(summary["over_starts"]),
        "labels": labels(summary["by_label"]),
        "rows": rows_table(summary["rows"]),
        "alone": alone(summary["without_a_model"]),
        "runs": runs_table(summary["runs"], summary["machines"]),
    }
    if (results / "longer").is_dir():
        made["longer"] = (results / "longer" / "comparison.md").read_text(encoding="utf-8").strip()
    if (results / "again").is_dir():
        made["again"] = methods(_csv(results / "again" / "comparison.csv"), _SHOWN)
    return made


def _csv(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def methods(lines: list[dict[str, str]], statistics: dict[str, str]) -> str:
    """One row per method: statistics on every benchmark with 95 % intervals, the mean over seeds."""
    benchmarks = list(dict.fromkeys(line["benchmark"] for line in lines))
    head = [f"{b}: {what}" for b in benchmarks for what in statistics.values()]
    table = [["method", "seeds", *head], ["---"] * (2 + len(head))]
    for method in dict.fromkeys(line["method"] for line in lines):
        mine = {(line["benchmark"], line["statistic"]): line for line in lines if line["method"] == method}
        cells = [interval(mine.get((b, s))) for b in benchmarks for s in statistics]
        table.append([f"`{method}`", next(iter(mine.values()))["seeds"], *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def interval(line: dict[str, str] | None) -> str:
    """A number of the comparison's CSV with its interval."""
    if not line or not line["value"]:
        return "-"
    ends = f" [{float(line['low']):.2f}, {float(line['high']):.2f}]" if line["low"] else ""
    return f"{float(line['value']):.2f}{ends}"


def per_seed(results: list[dict[str, Any]]) -> str:
    """Pearson correlation and RMSE of every seed."""
    benchmarks = list(dict.fromkeys(r["benchmark"] for r in results))
    table = [["method", *benchmarks], ["---"] * (1 + len(benchmarks))]
    for method in dict.fromkeys(r["method"] for r in results):
        row = [f"`{method}`"]
        for benchmark in benchmarks:
            mine = [r for r in results if (r["method"], r["benchmark"]) == (method, benchmark)]
            correlations = ", ".join("-" if r["pearson"] is None else f"{r['pearson']:.2f}" for r in mine)
            errors = ", ".join("-" if r["rmse"] is None else f"{r['rmse']:.2f}" for r in mine)
            row.append(f"{correlations} ({errors})")
        table.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in table) + "\n\nPearson of each seed, in brackets RMSE."


def alone(found: dict[str, dict[str, float | None]]) -> str:
    """What needs no model."""
    lines = ["| benchmark | response length: Pearson | Spearman | the mean training label: RMSE |", "|---|---|---|---|"]
    for benchmark, values in found.items():
        lines.append(f"| {benchmark} | {' | '.join('-' if v is None else f'{v:.2f}' for v in values.values())} |")
    return "\n".join(lines)


def labels(found: list[dict[str, Any]]) -> str:
    """RMSE and mean prediction by label."""
    parts = found[0]["parts"]
    heads = [f"{p['labels']} ({p['n']} rows)" for p in parts]
    lines = [f"| method | {' | '.join(heads)} |", "|---|" + "---|" * len(parts)]
    for method in found:
        cells = ["-" if p["rmse"] is None else f"{p['rmse']:.2f} ({p['prediction']:.2f})" for p in method["parts"]]
        lines.append(f"| `{method['method']}` | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\nRMSE on {found[0]['benchmark']} by label, in brackets the mean prediction."


def starts(found: list[dict[str, Any]]) -> str:
    """What the methods gain over their starts."""
    table = [["method", "start", "Δ Pearson", "Δ Spearman", "Δ RMSE"], ["---"] * 5]
    for gain in found:
        cells = []
        for name in ("pearson", "spearman", "rmse"):
            e = gain[name]
            known = None not in (e["value"], e["low"], e["p"])
            cells.append(f"{e['value']:+.2f} [{e['low']:+.2f}, {e['high']:+.2f}], p = {e['p']:.3f}" if known else "-")
        table.append([f"`{gain['method']}`", f"`{gain['start']}`", *cells])
    text = "\n".join(f"| {' | '.join(row)} |" for row in table)
    return f"{text}\n\nDifferences on {found[0]['benchmark']}, intervals as above." if found else text


def rows_table(rows: dict[str, dict[str, Any]]) -> str:
    """What became of every file's rows."""
    lines = ["| file | rows | left out | trained on | held out and graded |", "|---|---|---|---|---|"]
    for name, counts in rows.items():
        reasons = ", ".join(f"{count} ({reason})" for reason, count in counts["left_out"].items()) or "0"
        lines.append(f"| {name} | {counts['rows']} | {reasons} | {counts['train']} | {counts['test']} |")
    return "\n".join(lines)


def runs_table(runs: dict[str, dict[str, Any]], machines: list[dict[str, Any]]) -> str:
    """What the runs saw and took, the mean over seeds; what they start from is not included."""
    lines = [
        "| method | updates | rows seen | seconds of training | feedback tokens | truncated | off-scale mass "
        "| groups without spread | score entropy | KL to the start |",
        "|---|" + "---|" * 9,
    ]
    for method in dict.fromkeys(name.rpartition("-")[0] for name in runs):
        mine = [run for name, run in runs.items() if name.rpartition("-")[0] == method]
        cells = [
            _mean(mine, key, digits)
            for key, digits in {
                "updates": 0,
                "rows_seen": 0,
                "training_seconds": 0,
                "mean_length": 0,
                "truncated": 2,
                "off_scale_mass": 3,
                "zero_spread": 2,
                "score_entropy": 2,
                "kl": 4,
            }.items()
        ]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    about = "; ".join(", ".join(f"{k} {v}" for k, v in machine.items()) for machine in machines)
    notes = (
        "Length, truncation and off-scale mass are those of the evaluation; groups without spread and score entropy "
        "(nats) are means over the updates, KL (nats a token) that of the last one, where it was measured."
    )
    return "\n".join([*lines, f"\n{notes} Machine: {about}."])


def _mean(runs: list[dict[str, Any]], key: str, digits: int) -> str:
    known = [run[key] for run in runs if run[key] is not None]
    return f"{sum(known) / len(known):.{digits}f}" if known else "-"
