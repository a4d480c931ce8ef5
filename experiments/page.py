"""Write the experiment's tables into README and docs/experiment.md: ``python -m experiments.page``.

They come from what ``make experiment`` left in experiments/.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from benchmarks.report import fill

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
PAGE = HERE.parent / "docs" / "experiment.md"


def main() -> None:
    """The table of README, and those of docs/experiment.md."""
    with (HERE / "comparison.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    text = fill(
        README.read_text(encoding="utf-8"), "experiment", methods(lines, {"pearson": "Pearson", "rmse": "RMSE"})
    )
    README.write_text(text, encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    text = fill(text, "comparison", (HERE / "comparison.md").read_text(encoding="utf-8").strip())
    summary = json.loads((HERE / "summary.json").read_text(encoding="utf-8"))
    text = fill(text, "reduced", "\n".join(f"- {line}" for line in summary["reduced"]))
    text = fill(text, "seeds", per_seed(summary["results"]))
    text = fill(text, "alone", alone(summary["without_a_model"]))
    PAGE.write_text(fill(text, "runs", runs_table(summary["runs"], summary["machines"])), encoding="utf-8")


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
            errors = ", ".join(f"{r['rmse']:.2f}" for r in mine)
            row.append(f"{correlations} ({errors})")
        table.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in table) + "\n\nPearson of each seed, in brackets RMSE."


def alone(found: dict[str, dict[str, float | None]]) -> str:
    """What needs no model."""
    lines = ["| benchmark | response length: Pearson | Spearman | the mean training label: RMSE |", "|---|---|---|---|"]
    for benchmark, values in found.items():
        lines.append(f"| {benchmark} | {' | '.join('-' if v is None else f'{v:.2f}' for v in values.values())} |")
    return "\n".join(lines)


def runs_table(runs: dict[str, dict[str, Any]], machines: list[dict[str, Any]]) -> str:
    """What the runs saw and took, the mean over seeds."""
    table = [
        "| method | updates | rows seen | seconds | feedback tokens | truncated | off-scale mass |",
        "|---|" + "---|" * 6,
    ]
    for method in dict.fromkeys(name.rpartition("-")[0] for name in runs):
        mine = [run for name, run in runs.items() if name.rpartition("-")[0] == method]

        def mean(key: str, mine: list[dict[str, Any]] = mine) -> float:
            return float(sum(run[key] for run in mine)) / len(mine)

        seconds = sum(sum(run["seconds"].values()) for run in mine) / len(mine)
        table.append(
            f"| `{method}` | {mine[0]['updates']} | {mine[0]['rows_seen']} | {seconds:.0f} | {mean('mean_length'):.0f} "
            f"| {100 * mean('truncated'):.0f} % | {mean('off_scale_mass'):.3f} |"
        )
    about = "; ".join(", ".join(f"{k} {v}" for k, v in machine.items()) for machine in machines)
    return "\n".join([*table, f"\nMachine: {about}."])


if __name__ == "__main__":
    main()
