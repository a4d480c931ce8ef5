"""Ratios and plots out of ``results/benchmarks.csv``: ``python -m benchmarks.report``.

Writes ``summary.json`` and PNG files beside the CSV; ``python -m tools.tables`` makes tables of the same numbers.
Ratios compare measurements of one run alone; of several runs of the same thing, the newest counts.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import report_head
from benchmarks.record import RESULTS, read
from benchmarks.steps import FASTER, VARIANTS

CONTENDERS = ("reference", "trl", "trl async", *VARIANTS, *FASTER, "ours and rollouts")
PHASES = ("rollout", "pack", "body forward", "head", "backward", "optimizer", "sync", "step")
_COLOURS = ("#56B4E9", "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#F0E442", "#999933")
NAMES = {
    "reference": "reference-style",
    "trl": "TRL GRPOTrainer",
    "trl async": "TRL AsyncGRPOTrainer",
    "ours": "real-fast",
    "no shared prompt": "… without shared prompts",
    "two forwards": "… with a second forward for ŷ",
    "full logits": "… with full logits",
    "every row": "… with zero-coefficient rows",
    "compiled layers": "… with compiled layers",
    "Liger's layers": "… with Liger's layers",
    "ours and rollouts": "real-fast, rollouts and sync included",
}

Key = tuple[str, str, str]  # machine, model, case


def newest(lines: list[dict[str, str]], suite: str) -> dict[Key, dict[str, dict[str, float]]]:
    """Per machine, model and case: variant to metric to value, from the newest run with the most contenders.

    A later run of a part, such as ours alone, does not take the place of a comparison.
    """
    variants: dict[tuple[Key, str], set[str]] = defaultdict(set)
    for line in lines:
        if line["suite"] == suite:
            variants[(line["machine"], line["model"], line["case"]), line["run"]].add(line["variant"])
    runs: dict[Key, str] = {}
    for key, run in sorted(variants, key=lambda found: (len(variants[found]), found[1])):
        runs[key] = run
    found: dict[Key, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        key = (line["machine"], line["model"], line["case"])
        if line["suite"] == suite and line["run"] == runs[key]:
            found[key][line["variant"]][line["metric"]] = float(line["value"])
    return found


def parameters(case: str) -> dict[str, float]:
    """The numbers of a case such as "vicuna K=8 P=990 R=118 prompts=2"."""
    return {name: float(value) for name, value in re.findall(r"\b(\w+)=([\d.]+)", case)}


def speedups(steps: dict[Key, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """Ours over each contender, per case."""
    rows = []
    for (machine, model, case), variants in steps.items():
        ours = variants.get("ours", {})
        if "seconds" not in ours:
            continue
        row: dict[str, Any] = {"machine": machine, "model": model, "case": case, **parameters(case)}
        row["seconds"] = ours["seconds"]
        for name, other in variants.items():
            if name.startswith("ours") or "seconds" not in other:
                continue
            row[f"over_{name.replace(' ', '_')}"] = other["seconds"] / ours["seconds"]
            if "peak_bytes" in other and "peak_bytes" in ours:
                row[f"memory_over_{name.replace(' ', '_')}"] = other["peak_bytes"] / ours["peak_bytes"]
        if "reference" in variants:
            row["predicted_by_flops"] = variants["reference"]["flops"] / ours["flops"]
        rows.append(row)
    return rows


def lora_steps(found: dict[Key, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """Per case and engine: seconds, peaks in bytes, those of the plan, and the measured ones over them."""
    rows = []
    for (machine, model, case), variants in found.items():
        for engine, v in variants.items():
            over = {
                name.replace("_planned_bytes", "_over_plan"): v[name.replace("_planned", "")] / planned
                for name, planned in v.items()
                if name.endswith("_planned_bytes") and planned
            }
            rows.append({"machine": machine, "model": model, "case": case, "engine": engine, **v, **over})
    return rows


def summarize(lines: list[dict[str, str]]) -> dict[str, Any]:
    """What ``summary.json`` holds: ``step_speedup`` per machine, model and K, every case with all its ratios, the
    head's ratios per shape and mode in ``head_cases``, and the LoRA step beside its plan in ``lora_steps``.
    """
    rows = speedups(newest(lines, "step"))
    table: dict[str, Any] = {}
    for row in rows:
        # Of several cases with one K, the one with the most contenders stands for it.
        place = table.setdefault(row["machine"], {}).setdefault(row["model"], {})
        k = f"{row['K']:.0f}"
        if k not in place or sum(n.startswith("over_") for n in row) > sum(n.startswith("over_") for n in place[k]):
            place[k] = {n: v for n, v in row.items() if n not in ("machine", "model", "K")}
    heads = report_head.cases(newest(lines, "head"))
    loras = lora_steps(newest(lines, "lora"))
    return {"step_speedup": table, "step_cases": rows, "head_cases": heads, "lora_steps": loras}


def plot(lines: list[dict[str, str]], folder: Path) -> list[str]:
    """One figure per machine: seconds by phase, gain over K, gain over P/R. Returns the files' names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, names = newest(lines, "step"), []
    for machine in sorted({key[0] for key in steps}):
        mine = {key: v for key, v in steps.items() if key[0] == machine and "ours" in v and "seconds" in v["ours"]}
        if not mine:
            continue
        figure = Figure(figsize=(12, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        bars, by_k, by_ratio = figure.subplots(1, 3, width_ratios=[1.5, 1, 1])
        key = max(mine, key=lambda k: len(mine[k]))
        shown = [n for n in CONTENDERS if n in mine[key]][::-1]
        left = [0.0] * len(shown)
        for phase, colour in zip(PHASES, _COLOURS, strict=True):
            widths = [mine[key][n].get(f"seconds/{phase}", 0.0) for n in shown]
            if any(widths):
                label = "whole step (TRL)" if phase == "step" else phase
                bars.barh([NAMES[n] for n in shown], widths, left=left, color=colour, label=label)
                left = [a + b for a, b in zip(left, widths, strict=True)]
        bars.set_xlabel("seconds per update")
        bars.set_title(f"{key[1]}, {key[2]}", fontsize=10)
        bars.legend(fontsize=8, frameon=False)
        rows = [r for r in speedups(mine) if "over_reference" in r]
        data = key[2].split()[0]
        over_k = sorted((r for r in rows if r["case"].startswith(data)), key=lambda r: r["K"])
        over_ratio = sorted((r for r in rows if r["K"] == 8), key=lambda r: r["P"] / r["R"])
        for axes, name, chosen in (
            (by_k, "K, rollouts per prompt", over_k),
            (by_ratio, "P/R, prompt over response", over_ratio),
        ):
            x = [r["K"] if axes is by_k else r["P"] / r["R"] for r in chosen]
            axes.plot(x, [r["over_reference"] for r in chosen], "o-", color="#0072B2", label="measured")
            axes.plot(x, [r["predicted_by_flops"] for r in chosen], "s--", color="#6E6E6E", label="predicted by FLOPs")
            axes.set_xlabel(name)
            axes.set_ylabel("times the reference-style step")
            axes.set_ylim(bottom=0)
            axes.legend(fontsize=8, frameon=False)
        figure.suptitle(machine, fontsize=9)
        slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
        names.append(f"step-{slug}.png")
        figure.savefig(folder / names[-1], dpi=100)
    return names


def main() -> None:
    """Read the CSV; write summary.json and, where matplotlib is, the figures."""
    lines = read()
    (RESULTS / "summary.json").write_text(json.dumps(summarize(lines), indent=2) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        return
    plot(lines, RESULTS)
    report_head.plot(newest(lines, "head"), RESULTS)


if __name__ == "__main__":
    main()
