"""What the experiment computes from predictions: corrections, intervals, calibration, cost, baselines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import baselines, cost, honesty, noise, questions
from experiments.settings import Experiment, Question, load
from real_fast.comparison.find import Evaluation
from tests.experiments.tiny import TINY, rows, written


def test_holm() -> None:
    # Worked by hand: of four tests the smallest times 4, the next times 3, and no p below an earlier one.
    assert questions.holm([0.04, 0.01, None, 0.03]) == [pytest.approx(p) if p else p for p in (0.09, 0.04, None, 0.09)]
    assert questions.holm([0.6, 0.7]) == [1.0, 1.0] and questions.holm([]) == []


def noisy(method: str, benchmark: str, noise: float, seed: int | None) -> Evaluation:
    draw = np.random.default_rng([seed or 0, int(100 * noise)])
    labels = np.random.default_rng(7).uniform(1, 5, 60)
    made = [
        {"id": f"{i}", "prompt_id": f"{i // 2}", "label": float(y), "prediction": float(y + noise * draw.normal())}
        for i, y in enumerate(labels)
    ]
    return Evaluation(method, benchmark, "real", 1, made, Path(), Path(), seed)


def test_the_planned_test(tmp_path: Path) -> None:
    experiment = load(written(tmp_path / "e.yaml"), tmp_path)

    found = [
        noisy(method, benchmark, noise, seed)
        for method, noise, seeds in (("real", 0.5, (0, 1, 2)), ("sft", 2.5, (0, 1)), ("base", 0.52, (None,)))
        for seed in seeds
        for benchmark in ("seen", "new")
    ]
    better, even = questions.primary(experiment, found, 60)
    assert (better["method"], better["other"], better["benchmark"]) == ("real", "sft", "average")
    assert better["rows"] == 120 and (better["seeds"], better["above"]) == (2, 2) and even["seeds"] == 3
    assert (
        better["pearson"]["low"] > 0.2 and better["rmse"]["high"] < 0 and better["holm"] == 2 * better["pearson"]["p"]
    )
    assert even["pearson"]["low"] < 0 < even["pearson"]["high"] and even["holm"] > 0.05
    # A benchmark that is missing is no average of the others.
    assert questions.primary(experiment, [e for e in found if e.benchmark == "new"], 9) == []
    # The same pair the other way round is the same number with the other sign.
    tables = questions.tables_of(found, 20)
    there, back = (
        questions.difference(tables, ["new"], *pair)["pearson"] for pair in (("real", "sft"), ("sft", "real"))
    )
    assert there["value"] == pytest.approx(-back["value"]) and there["low"] == pytest.approx(-back["high"])
    lines = questions.answers(Question(["seen", "new", "gone"], [["real", "sft"], ["real", "none"]]), tables)
    assert [line["benchmark"] for line in lines] == ["seen", "new", "average"]
    assert lines[2]["pearson"]["value"] == pytest.approx(sum(line["pearson"]["value"] for line in lines[:2]) / 2)


def test_one_seed_of_a_trained_method_has_no_p() -> None:
    """Whatever the other has: its other seeds are not those that both have."""
    found = [noisy("real", "seen", 0.5, seed) for seed in (0, 1, 2)]
    alone = [replace(found[1], method="alone")]
    tables = questions.tables_of([*found, *alone, noisy("base", "seen", 0.9, None)], 40)
    same = questions.difference(tables, ["seen"], "real", "alone")
    assert same["pearson"] == {"value": 0, "low": 0, "high": 0, "p": None}
    assert (same["seeds"], same["above"]) == (1, 0)
    start = questions.difference(tables, ["seen"], "alone", "base")
    assert start["pearson"]["low"] is not None and start["pearson"]["p"] is None and start["seeds"] == 1
    assert questions.difference(tables, ["seen"], "real", "base")["pearson"]["p"] is not None
    (line,) = questions.corrected([same])
    assert line["holm"] is None
    each = [questions.tables_of([run, noisy("base", "seen", 0.9, None)], 1)["seen"] for run in found]
    above = sum((t.difference("real", "base")[0]["pearson"] or 0) > 0 for t in each)
    assert questions.difference(tables, ["seen"], "real", "base")["above"] == above


def test_the_central_interval_of_a_distribution() -> None:
    values = np.array([1.0, 2, 3, 4, 5])
    sure, low, wide, off = [0, 0, 0, 0, 1], [0.85, 0.1, 0.05, 0, 0], [0.2] * 5, [0, 0, 0.05, 0.05, 0]
    first, last = honesty.central(np.array([sure, low, wide, off]), values)
    assert first.tolist() == [4.5, 1, 1, 2.5] and last.tolist() == [5, 2.5, 5, 4.5]
    inside = honesty.mass_within(np.array([sure, low, wide, off]), values, first, last)
    assert inside == pytest.approx([1, 0.95, 1, 1])


def test_widening_holds_four_of_five_labels() -> None:
    draw = np.random.default_rng(0)
    labels = draw.normal(3, 1, 400)
    low, high = np.full(400, 2.9), np.full(400, 3.1)
    more = honesty.widening(low, high, labels)
    new = draw.normal(3, 1, 4000)
    assert np.mean((new >= 2.9 - more) & (new <= 3.1 + more)) == pytest.approx(0.8, abs=0.05)
    # Too wide an interval is narrowed.
    assert honesty.widening(np.full(400, -9.0), np.full(400, 15.0), labels) < -8


def test_an_isotonic_fit_mends_a_judge_that_is_two_points_too_low() -> None:
    draw = np.random.default_rng(0)
    labels = draw.uniform(2.5, 5, 400)
    near = np.clip(np.round(labels - 2 + 0.3 * draw.normal(size=400)), 1, 5).astype(int)
    p = 0.9 * np.eye(5)[near - 1] + 0.02
    known = np.hstack([(p @ [1, 2, 3, 4, 5])[:, None], p])
    found = honesty.honesty([1, 2, 3, 4, 5], (known[:200], labels[:200]), (known[200:], labels[200:]))
    assert found["error"] > 1.5 and found["fitted_error"] < 0.25 and found["fitted_rmse"] < found["rmse"]
    assert found["coverage"] < 0.2 and found["conformal_coverage"] == pytest.approx(0.8, abs=0.12)
    assert found["conformal_width"] > found["width"]
    rows_of = [{"id": "1", "score": 2}, {"id": "2", "score": 3}, {"id": "3", "score": 4}]
    assert honesty.arrays({"1": [2.0, 1.0], "2": [None], "3": [0.0, 0.0]}, rows_of) is None  # all of it off the scale
    both = honesty.arrays({"1": [2.0, 1.0], "2": [None], "3": [3.0, 1.0]}, rows_of)
    assert both is not None and both[1].tolist() == [2, 4]


def test_baselines_are_fitted_on_training_rows_alone() -> None:
    draw = np.random.default_rng(0)
    words = [f"w{i}" for i in range(40)]

    def row(i: int) -> dict[str, Any]:
        reference = list(draw.choice(words, 10, replace=False))
        kept = int(draw.integers(0, 11))
        other = [f"x{j}" for j in draw.integers(0, 9, 10 - kept)]
        text = " ".join(reference[:kept] + other)
        about = {"id": f"{i}", "instruction": "?", "reference_answer": " ".join(reference)}
        return about | {"response": text, "score": 1 + kept / 2.5}

    made = [row(i) for i in range(160)]
    train, test = made[:100], made[100:]
    found = baselines.predictions(train, test)
    labels = np.array([r["score"] for r in test])
    assert found.keys() == {"mean_label", "length", "overlap", "tfidf_ridge"}
    assert found["mean_label"] == [pytest.approx(sum(r["score"] for r in train) / 100)] * 60
    for name in ("overlap", "tfidf_ridge"):
        assert np.corrcoef(found[name], labels)[0, 1] > 0.9
    # The graded rows' labels are not looked at.
    hidden = [{**r, "score": 1} for r in test]
    assert baselines.predictions(train, hidden)["tfidf_ridge"] == found["tfidf_ridge"]
    assert baselines.overlap({"response": "The cat, sat", "instruction": "a CAT sat"}) == 0.5


def test_how_well_raters_agree() -> None:
    assert baselines.raters([{"score": 1}]) is None
    agree = baselines.raters([{"scores": [v, v, v]} for v in (1, 2, 4, 5)])
    assert agree == {"raters": 3, "n": 4, "pearson": pytest.approx(1)}
    found = baselines.raters(rows())
    assert found is not None and found["raters"] == 2 and 0.5 < found["pearson"] < 1


def test_what_it_costs_to_get_there(tmp_path: Path) -> None:
    experiment: Experiment = load(written(tmp_path / "e.yaml", reach=[1.0, 0.5]), tmp_path)

    def run(cpu: float, *curve: tuple[float, float | None]) -> dict[str, Any]:
        points = [{"cpu": at, "tokens": 10 * at, "rows": at, "rmse": rmse} for at, rmse in curve]
        about = {"updates": 4, "training_cpu_seconds": cpu, "tokens_sampled": 10 * cpu, "rows_seen": cpu}
        return about | {"curve": points}

    runs = {
        ("base", 0): run(0) | {"updates": 0},
        ("sft", 0): run(100, (50, 1.2), (100, 0.9)),
        ("sft", 1): run(200, (100, 1.1), (200, 1.05)),
        ("real", 0): run(40, (20, None), (40, 0.4)),
        ("real", 1): run(60, (30, 1.0), (60, 0.8)),
    }
    sft, real = cost.costs(experiment, runs)
    assert (sft["method"], sft["runs"], sft["cpu"]) == ("sft", 2, 150)
    assert sft["reach"][0] == {"rmse": 1.0, "runs": 1, "cpu": None, "tokens": None, "rows": None}  # half never did
    assert sft["reach"][1]["runs"] == 0 and sft["reach"][1]["cpu"] is None
    # With what they start from: 100 + 40 and 200 + 30.
    assert real["reach"][0] == {"rmse": 1.0, "runs": 2, "cpu": 185, "tokens": 1850, "rows": 185}
    assert real["reach"][1]["runs"] == 1 and real["reach"][1]["cpu"] is None and real["cpu"] == 200
    runs["real", 0]["curve"] += [{"cpu": 41, "tokens": 1, "rows": 1, "rmse": 1.1}]  # worse again at the end
    real = cost.costs(experiment, runs)[1]
    assert real["reach"][0]["runs"] == 1
    assert cost.curves(runs).keys() == {"sft-0", "sft-1", "real-0", "real-1"} and TINY["reach"] == [9.0, 0.0]


def test_signal_and_noise_of_known_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.ones(4000) / 4000**0.5  # |G|² = 1
    noisy = true + torch.randn(40, 4000, generator=generator) * (3 / 4000) ** 0.5  # tr(Σ) / b = 3
    found = noise.noise(noisy, prompts=5)
    assert found["signal"] == pytest.approx(1 / 4, abs=0.02) and found["low"] < 1 / 4 < found["high"]
    assert found["norm"] == pytest.approx((4 * noise._STRIDE) ** 0.5, rel=0.05)
    assert found["noise_scale"] == pytest.approx(15, rel=0.1)  # b tr(Σ / b) / |G|²
    assert noise.noise(true.repeat(3, 1), 5)["signal"] == pytest.approx(1)
    nothing = noise.noise(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), 5)
    assert nothing["noise_scale"] is None and nothing["signal"] < 0
    assert noise.noise(torch.zeros(3, 2), 5) == {"norm": 0, "signal": 0, "low": 0, "high": 0, "noise_scale": None}
