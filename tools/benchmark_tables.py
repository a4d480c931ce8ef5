"""Tables of the benchmarks, out of the CSV files in benchmarks/results/."""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks.peers import NOT_INSTALLED
from benchmarks.plan_check import AGAIN, WAYS
from benchmarks.record import absent, read
from benchmarks.report import CONTENDERS, NAMES, Key, newest, parameters, speedups
from benchmarks.report_head import LABELS, ORDER, Metrics, savings

Lines = list[dict[str, str]]


def tables(results: Path, root: Path) -> dict[str, str]:
    """The tables by their markers' names; `root` is where the images' paths begin."""
    lines = read(results / "benchmarks.csv")
    place = "/" + results.relative_to(root).as_posix()
    return {
        "bench-step": step_table(lines),
        "bench-sweep": sweep_table(lines),
        "bench-rollout": rollout_table(lines),
        "bench-vllm": vllm_table(lines),
        "bench-plots": images("Seconds by phase; gain over K and over P/R", results, "step-*.png", place),
        "bench-head": heads(lines),
        "bench-head-savings": savings(newest(lines, "head")),
        "bench-head-plots": images("Seconds and peak memory of the head", results, "head-*.png", place),
        "kernels": kernel_table(results / "kernels.csv"),
        "plan-check": plan_table(lines),
    }


def text(lines: Lines) -> str:
    """What is worth reading right after measuring: the update, the sweep and the head."""
    return "\n\n".join((step_table(lines), sweep_table(lines), heads(lines), savings(newest(lines, "head"))))


def heads(lines: Lines) -> str:
    """The head's tables."""
    return head_table(newest(lines, "head"), left_out(lines, "head"))


# By machine and shape ("-" for all of them): contenders that did not run, and what a table says instead.
Absent = dict[tuple[str, str], dict[str, str]]


def left_out(lines: Lines, suite: str) -> Absent:
    """What a suite left out, in each machine's newest run."""
    newest_run = {line["machine"]: line["run"] for line in sorted(lines, key=lambda line: line["run"])}
    found: Absent = {}
    for line in lines:
        if line["suite"] == absent(suite) and line["run"] == newest_run[line["machine"]]:
            reason = line["case"]
            said = NOT_INSTALLED if reason.startswith(NOT_INSTALLED) else reason.replace("|", "/")
            found.setdefault((line["machine"], line["model"]), {})[line["variant"]] = said
    return found


def images(about: str, results: Path, pattern: str, place: str) -> str:
    """A figure per machine."""
    return "\n\n".join(f"![{about}]({place}/{file.name})" for file in sorted(results.glob(pattern)))


def step_table(lines: Lines) -> str:
    """The case with the most contenders, per machine and model."""
    steps, missing = newest(lines, "step"), left_out(lines, "step")
    best: dict[tuple[str, str], Key] = {}
    for key, variants in steps.items():
        if len(variants) > len(steps.get(best.get(key[:2], ("", "", "")), {})):
            best[key[:2]] = key
    out = []
    for key in best.values():
        variants = steps[key]
        if "ours" not in variants:
            continue
        ours = variants["ours"]["seconds"]
        p = parameters(key[2])
        prompts = "1 prompt" if p["prompts"] == 1 else f"{p['prompts']:.0f} prompts"
        out += [
            f"{key[1]}, K = {p['K']:.0f}, P = {p['P']:.0f}, R = {p['R']:.0f}, {prompts} a step; {key[0]}:\n",
            "| step | seconds | samples/s | tokens through the body | memory above the weights | over real-fast |",
            "|---|---|---|---|---|---|",
        ]
        reasons = missing.get((key[0], "-"), {})
        for name in CONTENDERS:
            if name not in variants and name in reasons:
                out.append(f"| {NAMES[name]} | {reasons[name]} | | | | |")
            if name in variants:
                v = variants[name]
                peak = f"{v['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in v else "-"
                cells = [NAMES[name], f"{v['seconds']:.1f}", f"{v['samples_per_s']:.2f}", f"{v['body_tokens']:,.0f}"]
                cells += [peak, "" if name.startswith("ours") else f"{v['seconds'] / ours:.1f} ×"]
                out.append(f"| {' | '.join(cells)} |")
        out.append("")
    return "\n".join(out).rstrip()


def sweep_table(lines: Lines) -> str:
    """Gain over the reference-style step per case, beside what the operations predict."""
    out = ["| data | K | P | R | P/R | measured | predicted by FLOPs | over TRL |", "|---|---|---|---|---|---|---|---|"]
    rows = speedups(newest(lines, "step"))
    for row in sorted(rows, key=lambda r: (r["machine"], r["model"], r["case"].split()[0], r["K"])):
        if "over_reference" in row:
            cells = [row["case"].split()[0], *(f"{row[n]:.0f}" for n in "KPR"), f"{row['P'] / row['R']:.1f}"]
            cells += [f"{row['over_reference']:.1f} ×", f"{row['predicted_by_flops']:.1f} ×"]
            cells.append(f"{row['over_trl']:.1f} ×" if "over_trl" in row else "-")
            out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def plan_table(lines: Lines) -> str:
    """Peak of an update by way to train, a column of ratios per model: the plan over what was measured."""
    found: dict[str, Metrics] = {}
    where: dict[str, str] = {}
    # Each way is a process of its own, so the newest measurement of each counts, whatever was measured beside it.
    for line in lines:
        model, way = line["model"], line["variant"]
        if line["suite"] == "plan" and way.removesuffix(AGAIN) in WAYS:
            found.setdefault(model, {}).setdefault(way, {})[line["metric"]] = float(line["value"])
            where[model] = f"{model} ({line['case']}; {line['machine']})"
    if not found:
        return "No measurement is kept yet."
    out = [f"| trained | {' | '.join(f'{where[model]}: measured | plan | ratio' for model in found)} |"]
    out.append("|---" * (1 + 3 * len(found)) + "|")
    for way in [way + again for way in WAYS for again in ("", AGAIN)]:
        cells = [way]
        for ways in found.values():
            v = ways.get(way)
            measured = [f"{v[name] / 2**30:.2f} GiB" for name in ("peak_bytes", "planned_bytes")] if v else ["-", "-"]
            cells += [*measured, f"{v['ratio']:.2f}" if v else "-"]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def rollout_table(lines: Lines) -> str:
    """Sampled tokens per second, and memory."""
    names = {
        "ours": "real-fast's Transformers engine",
        "no shared prefill": "… with a prefill per rollout",
        "transformers generate": "`model.generate(num_return_sequences=K)`, which gives no score",
        "one question": "real-fast's Transformers engine, answers to one question",
        "one question, not shared": "… with a prefill per prompt",
    }
    out = ["| rollouts | case | tokens/s | memory above the weights |", "|---|---|---|---|"]
    for (machine, model, case), variants in newest(lines, "rollout").items():
        for name, v in variants.items():
            peak = f"{v['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in v else "-"
            out.append(f"| {names.get(name, name)} | {model}, {case}; {machine} | {v['tokens_per_s']:.0f} | {peak} |")
    return "\n".join(out)


def vllm_table(lines: Lines) -> str:
    """vLLM's bookkeeping a token, and its speed with a real model."""
    names = {
        "earlier": "a dictionary a step, its tokens spelled, score tokens at every step",
        "ours": "flat, nothing spelled",
        "ours, scores not read": "… and no score tokens, where nobody reads them",
    }
    out = ["| log-probabilities | case | bookkeeping, µs a token | tokens/s |", "|---|---|---|---|"]
    for (machine, model, case), variants in newest(lines, "vllm").items():
        for name, v in variants.items():
            numbers = [f"{v[metric]:.0f}" if metric in v else "-" for metric in ("host_us", "tokens_per_s")]
            cells = [names[name], f"{model}, {case}; {machine}", *numbers]
            out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def head_table(found: dict[Key, Metrics], missing: Absent) -> str:
    """Forward and backward, a table per machine and shape; the peak is above inputs and resulting gradients.

    Those in `missing` have a line that says why they are not measured.
    """
    out = []
    for (machine, model, case), variants in sorted(found.items()):
        if not case.endswith("+backward"):
            continue
        forward = found.get((machine, model, case.removesuffix("+backward")), {})
        out += [
            f"{model.replace(' fp', ', fp').replace(' bf', ', bf')}, {case.split()[0]}; {machine}:\n",
            "| head | forward | forward and backward | of the matmul rate | peak memory | gradient error |",
            "|---|---|---|---|---|---|",
        ]
        reasons = missing.get((machine, "-"), {}) | missing.get((machine, model), {})
        for name in ORDER:
            m = variants.get(name)
            if m is None:
                if name in reasons:
                    out.append(f"| {LABELS[name]} | {reasons[name]} | | | | |")
                continue
            only = f"{_time(forward[name]['seconds'])}" if name in forward else "-"
            peak = f"{m['peak_bytes'] / 2**20:,.0f} MiB" if "peak_bytes" in m else "-"
            cells = [LABELS[name], only, _time(m["seconds"]), f"{m['of_matmul_rate']:.0%}", peak]
            cells.append(f"{m['gradient_error']:.1e}")
            out.append(f"| {' | '.join(cells)} |")
        out.append("")
    return "\n".join(out).rstrip()


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.{0 if seconds >= 0.1 else 1}f} ms"


def kernel_table(file: Path) -> str:
    """What every Triton kernel compiles to: default tiles and alternatives, a line each."""
    out = [
        "| for | kernel | variant | dtype | tile | warps | registers | spilled | shared memory | programs | epilogue "
        "| instructions |"
    ]
    out.append("|---|" + "---|" * 11)
    with file.open(encoding="utf-8", newline="") as compiled:
        for line in csv.DictReader(compiled):
            instructions = " ".join(x for x in (line["matrix_instructions"], line["copies"]) if x != "-") or "-"
            cells = [line[name] for name in ("arch", "kernel", "variant", "dtype", "tile", "warps", "registers")]
            cells += [f"{line['spills']} B", f"{int(line['shared']):,} B"]
            cells += [line[name] if line[name] != "0" else "-" for name in ("programs", "instructions")]
            cells.append(instructions)
            out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)
