"""Tables of full fine-tuning in less memory and of faster layers, out of JSON files in benchmarks/results/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def tables(results: Path) -> dict[str, str]:
    """The tables by their markers' names."""
    optimizers, heads, body = (_read(results / f"{name}.json") for name in ("optimizers", "head_gradient", "body"))
    return {
        "optimizers": optimizer_table(optimizers),
        "head-gradient": head_table(heads),
        "body-measured": body_table(body),
        "body-arithmetic": arithmetic_table(body),
    }


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


def body_table(report: dict[str, Any]) -> str:
    """A forward and backward pass with the model's own layers and with compiled ones."""
    out = [
        f"SmolLM2-135M, {report['prompts']} prompts of {report['prompt_tokens']} tokens with {report['k']} responses "
        f"of {report['response_tokens']}, body alone, median of {report['turns']} turns; {report['machine']}:\n",
        "| precision | own layers | compiled | gain | kept for the backward pass: own | compiled | compiling |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in report["measured"]:
        own, compiled = line["own"], line["compiled"]
        memory = [f"{line[key] / 2**20:.0f} MiB" for key in ("kept_own", "kept_compiled")]
        out.append(
            f"| {line['precision']} | {own:.2f} s | {compiled:.2f} s | {100 * (own / compiled - 1):.0f} % | "
            f"{memory[0]} | {memory[1]} | {line['first'] - compiled:.0f} s |"
        )
    return "\n".join(out)


def arithmetic_table(report: dict[str, Any]) -> str:
    """What a token costs on a GPU outside of matrix products, and what it keeps: own layers and Liger's."""
    card = report["arithmetic"][0]["card"].upper()
    out = [
        f"A token's forward and backward pass through all layers, {card}, bf16 products over fp32 weights:\n",
        "| model | products | between them: own layers | Liger's | the body is faster by | kept: own | Liger's |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in report["arithmetic"]:
        products, own, liger = (1e6 * line[f"seconds_{key}"] for key in ("products", "own", "liger"))
        gain = (products + own) / (products + liger) - 1
        memory = [f"{line[key] / 1e6:.1f} MB" for key in ("kept_own", "kept_liger")]
        out.append(
            f"| {line['model'].rpartition('/')[2]} | {products:.0f} µs | {own:.0f} µs | {liger:.0f} µs | "
            f"{100 * gain:.0f} % | {memory[0]} | {memory[1]} |"
        )
    return "\n".join(out)


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
