"""Tables of full fine-tuning in less memory, out of benchmarks/results/optimizers.json and head_gradient.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def tables(results: Path) -> dict[str, str]:
    """The tables by their markers' names."""
    optimizers, heads = (_read(results / f"{name}.json") for name in ("optimizers", "head_gradient"))
    return {"optimizers": optimizer_table(optimizers), "head-gradient": head_table(heads)}


def optimizer_table(report: dict[str, Any]) -> str:
    """Error of the sum of all updates against fp32 AdamW's, and how many weights moved."""
    out = [
        f"{report['model']}, {report['steps']} updates at learning rate {report['lr']:g}; {report['machine']}:\n",
        "| option | error to fp32 AdamW | weights that moved |",
        "|---|---|---|",
    ]
    for line in report["options"]:
        error = "0" if line["error"] == 0 else f"{100 * line['error']:.2g} %"
        out.append(f"| {line['option']} | {error} | {100 * line['moved']:.1f} % |")
    return "\n".join(out)


def head_table(report: dict[str, Any]) -> str:
    """Bytes a parameter and micro-batch, and memory, summed by autograd and in place."""
    out = [
        f"{report['micro_batches']} micro-batches of {report['rows']} rows; {report['machine']}:\n",
        "| head | computed in | summed by | bytes a parameter and micro-batch | peak above weight and gradient |",
        "|---|---|---|---|---|",
    ]
    for line in report["cases"]:
        dtype, how = ("bf16" if line["bf16"] else "fp32"), ("the product" if line["fused"] else "autograd")
        peak = "–" if line["peak_above"] is None else f"{line['peak_above'] / 2**20:.0f} MiB"
        shape = f"{line['model']} ({line['V']:,} × {line['D']})"
        out.append(f"| {shape} | {dtype} | {how} | {line['bytes']:.1f} | {peak} |")
    return "\n".join(out)


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
