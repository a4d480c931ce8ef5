"""Predictions of a GPU are no measurements: their cells stay empty until a card's lines are there."""

from __future__ import annotations

import csv

import pytest

from benchmarks.record import COLUMNS, add, read
from tools import tables
from tools.gpu_tables import predictions, rows

MODEL = "V=151936 D=4096 bf16"


def line(suite, model, variant, case, metric, value, run="1", device="cuda", machine="H100"):
    return dict.fromkeys(COLUMNS, "") | {
        "run": run, "device": device, "machine": machine, "suite": suite, "model": model, "variant": variant,
        "case": case, "metric": metric, "value": str(value),
    }  # fmt: skip


def cells(text, beginning):
    found = [x for x in text.splitlines() if x.startswith(f"| {beginning}")]
    return [cell.strip() for cell in found[0].split("|")[1:-1]]


def test_nothing_is_measured_without_a_card():
    lines = [line("phases", MODEL, "default", "N=8192 forward", "seconds", 0.05, device="cpu")]
    for text in (
        predictions([]),
        predictions(lines),
        predictions(read(tables.ROOT / "benchmarks/results/benchmarks.csv")),
    ):
        body = text.splitlines()[2:]
        assert len(body) == len(list(rows())) and all(row.endswith("|  |") for row in body)
    assert cells(predictions([]), "… head, forward and backward")[1] == "44.5 ms, 86 % of the matmul rate"
    assert cells(predictions([]), "… TRL chunked")[2] == "167 ms, 13.1 GiB"


def test_the_newest_run_of_each_card_fills_its_cells():
    lines = []
    for run, seconds in (("2", 0.0461), ("1", 0.09)):
        lines += [
            line("phases", MODEL, "default", "N=8192 forward", metric, value, run)
            for metric, value in (("seconds", seconds), ("of_matmul_rate", 0.84), ("seconds/dlogits", 1.91e-3))
        ]
    lines += [line("phases", MODEL, "another tile", "N=8192 forward", "seconds", 1.0, "3")]
    lines += [line("phases", MODEL, "default", "N=8192 evaluation", "seconds", 1.0, "2")]
    lines += [line("head", MODEL, "eager", "N=8192 forward+backward", "peak_bytes", 20 * 2**30)]
    for variant, seconds in (("ours", 2.0), ("reference", 9.0)):
        lines += [line("step", "Qwen3-0.6B", variant, "random K=8", "seconds", seconds)]
    text = predictions(lines)
    assert cells(text, "… head, forward and backward")[3] == "46.1 ms, 84% of the matmul rate (H100)"
    assert cells(text, "… of that, dlogits")[3] == "1.91 ms (H100)"
    assert cells(text, "… full logits")[3] == "20.0 GiB (H100)"
    assert cells(text, "update at Qwen3-0.6B")[3] == "4.5 × (H100)"
    assert cells(text, "update at Qwen3-8B")[3] == ""


def write(path, lines, columns=COLUMNS):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)


def test_lines_of_elsewhere_are_added_once(tmp_path):
    ours, theirs = tmp_path / "ours.csv", tmp_path / "theirs.csv"
    one, two = (line("head", MODEL, "eager", "N=1", "seconds", value) for value in (1, 2))
    write(ours, [one])
    write(theirs, [one, two])
    assert add(theirs, ours) == 1 and add(theirs, ours) == 0
    assert read(ours) == [one, two]
    write(theirs, [one], COLUMNS[1:])
    with pytest.raises(ValueError, match="its columns are"):
        add(theirs, ours)
