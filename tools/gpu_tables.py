"""What is predicted and published of a GPU, beside what gpu-check has measured: empty until a card fills it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.gpu.cases import CASES, five_scores
from benchmarks.workload import random_workload
from real_fast.planning.flops import ModelFlops

Lines = Sequence[Mapping[str, str]]
# The shape that others publish, and what two passes over bfloat16 numbers take at the bandwidth that a kernel reaches.
N, V, BANDWIDTH = 8192, 151_936, 2.7e12
HEAD, PUBLISHED = "ours forward", "TRL issue 7244"
# Milliseconds that programs which go from tile to tile are to save, by D: of the 288 tiles that each of 132
# multiprocessors has, the end of one, the start of the next and its first fetch; at D 1024 stores wait longer, too.
GAIN = {4096: 0.7, 1024: 1.2}


@dataclass(frozen=True)
class Row:
    """A line of the table, and where its measurement stands in benchmarks.csv.

    Attributes:
        what: Of what.
        predicted: As text; "" for no prediction.
        published: By others, on an H100.
        suite, model, variant, case: Columns of the CSV; a case is looked for by its beginning.
        metrics: Which numbers are shown.
        over: A variant whose seconds are divided by this one's, and shown instead.
    """

    what: str
    predicted: str
    published: str
    suite: str
    model: str
    variant: str
    case: str
    metrics: tuple[str, ...] = ("seconds",)
    over: str = field(default="", kw_only=True)


def rows() -> Iterator[Row]:
    """All of them."""
    for d, milliseconds, share in ((4096, "44.5 ms, ", 86), (2048, "", 80), (1024, "", 71)):
        model, shape = f"V={V} D={d} bf16", f"N {N:,}, D {d:,}, V {V:,}"
        seconds = ("seconds", "of_matmul_rate")
        three = "42 ms" if d == 4096 else ""
        yield Row(f"{shape}: three products", "", three, "phases", model, "torch.mm", f"N={N} products", seconds)
        whole = f"{milliseconds}{share} % of the matmul rate"
        yield Row("… head, forward and backward", whole, "", "phases", model, "default", f"N={N} forward", seconds)
        if d in GAIN:
            stored, case = "forward, logits stored", f"N={N} forward"
            yield Row(f"… of that, {stored}", "", "", "phases", model, "default", case, (f"seconds/{stored}",))
            predicted = f"{GAIN[d]} ms less than that"
            way = "128x256x64, 3 stages, persistent"
            yield Row(
                "… the same by the persistent kernel", predicted, "", "phases", model, way, case, (f"seconds/{stored}",)
            )
        for phase, size in (("dlogits", 2 * N * V), ("scaling", 2 * (N + V) * d)):
            predicted = f"{2 * size / BANDWIDTH * 1e3:.2f} ms"
            if phase == "dlogits":  # one number a row, with a base per row
                predicted = f"below 0.1 ms; {predicted} with tiles' maxima"
            yield Row(
                f"… of that, {phase}",
                predicted,
                "",
                "phases",
                model,
                "default",
                f"N={N} forward",
                (f"seconds/{phase}",),
            )
        if d == 4096:
            both, case = ("seconds", "peak_bytes"), f"N={N} forward+backward"
            for name, variant, published in (
                ("full logits", "eager", "59 ms, 19.9 GiB"),
                ("TRL chunked", "trl chunked", "167 ms, 13.1 GiB"),
                ("Liger", "liger", "192 ms, 6.1 GiB"),
                ("real_kernels, gradient in forward", HEAD, ""),
            ):
                yield Row(f"… {name}, forward and backward", "", published, "head", model, variant, case, both)
    for qwen in CASES:
        groups = random_workload(qwen.vocabulary, five_scores(), qwen.prompts, qwen.k, qwen.p, qwen.r).groups
        ratio = ModelFlops.of(qwen.config()).update(groups, True, qwen.half_weights).ratio
        what = f"update at {qwen.name}'s shape, P {qwen.p:,}, R {qwen.r}, K {qwen.k}, over the reference-style one"
        yield Row(what, f"{ratio:.1f} ×", "", "step", qwen.name, "ours", "random", over="reference")


def predictions(lines: Lines) -> str:
    """The table."""
    out = ["| on one H100, bf16 | predicted | published by others | measured |", "|---|---|---|---|"]
    out += [f"| {row.what} | {row.predicted} | {row.published} | {_measured(row, lines)} |" for row in rows()]
    return "\n".join(out)


def _measured(row: Row, lines: Lines) -> str:
    """Of the newest run of each card."""
    runs: dict[str, str] = {}
    found: dict[tuple[str, str, str, str], float] = {}
    for line in lines:
        here = line["suite"] == row.suite and line["model"] == row.model and line["device"] == "cuda"
        if here and line["case"].startswith(row.case) and line["variant"] in (row.variant, row.over):
            if line["variant"] == row.variant:
                runs[line["machine"]] = max(runs.get(line["machine"], ""), line["run"])
            found[line["machine"], line["run"], line["variant"], line["metric"]] = float(line["value"])
    cells = []
    for machine, run in runs.items():
        values = [found.get((machine, run, row.variant, metric)) for metric in row.metrics]
        if row.over and values[0]:
            other = found.get((machine, run, row.over, "seconds"))
            shown = [] if other is None else [f"{other / values[0]:.1f} ×"]
        else:
            shown = [_text(name, value) for name, value in zip(row.metrics, values, strict=True) if value is not None]
        if shown:
            cells.append(f"{', '.join(shown)} ({machine})")
    return "; ".join(cells)


def _text(metric: str, value: float) -> str:
    if metric == "of_matmul_rate":
        return f"{value:.0%} of the matmul rate"
    return f"{value / 2**30:.1f} GiB" if metric == "peak_bytes" else f"{1e3 * value:.{1 if value > 5e-3 else 2}f} ms"
