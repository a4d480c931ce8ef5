"""Comparing runs: what is found, what is paired with what, and what the table says."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import yaml

from real_fast.compare import main
from real_fast.comparison.bootstrap import drawn_seeds
from real_fast.comparison.compare import AVERAGE, compare
from real_fast.comparison.find import Evaluation, find_evaluations, in_order_of, pool_seeds
from real_fast.comparison.plot import comparison_plot
from real_fast.comparison.table import ResultRow
from real_fast.comparison.text import markdown
from real_fast.errors import NoEvaluationError
from real_fast.evaluation import metrics
from real_fast.evaluation.metrics import WITH_INTERVALS, correlations, summarize
from real_fast.utils.jsonio import write_json, write_jsonl

PROMPTS, EACH = 30, 3


@pytest.fixture
def pearson_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that read no other correlation: those of ranks are most of the time of every resample."""
    for name in ("spearman", "kendall"):
        monkeypatch.setitem(metrics._TEST, name, lambda _x, _y: SimpleNamespace(statistic=0.5))


def predictions(noise: float, seed: int, shift: float = 0.0, data: int = 0, missing: int = 0) -> list[dict[str, Any]]:
    """Labels that follow from `data` alone, and predictions with noise; one part of it is common to all `seed`s."""
    labels = np.random.default_rng(data).uniform(1, 5, PROMPTS * EACH)
    hard = np.random.default_rng(data + 100).normal(size=labels.shape)
    own = np.random.default_rng(seed + 200).normal(size=labels.shape)
    x = labels + shift + 0.8 * hard + noise * own
    return [
        {"id": f"d{data}-{i}", "prompt_id": f"p{i // EACH}", "label": float(labels[i]), "n": 1}
        | {"prediction": None if i < missing else float(x[i])}
        for i in range(len(labels))
    ]


def evaluation(method: str, rows: list[dict[str, Any]], benchmark: str = "b.jsonl") -> Evaluation:
    return Evaluation(method, benchmark, "real", 1, rows, Path(method) / "predictions.jsonl", Path(method))


def by(lines: list[ResultRow], method: str, benchmark: str = "b.jsonl") -> ResultRow:
    [line] = [line for line in lines if (line.method, line.benchmark) == (method, benchmark)]
    return line


def evaluated(folder: Path, rows: list[dict[str, Any]], data: str = "b.jsonl", **summary: Any) -> Path:
    """A folder as real_fast.evaluate leaves it."""
    folder.mkdir(parents=True)
    found = summarize([r["prediction"] for r in rows], [r["label"] for r in rows], [r["prompt_id"] for r in rows], 10)
    write_jsonl(folder / "predictions.jsonl", rows[::-1])  # in another order, which must not matter
    write_json(folder / "summary.json", {"model": "m", "data": f"some/where/{data}", **found, **summary})
    return folder


def trained(folder: Path, rows: list[dict[str, Any]], data: dict[str, Any]) -> Path:
    """A folder as a finished run leaves it."""
    (folder / "eval").mkdir(parents=True)
    for name in ("before", "after"):
        write_jsonl(folder / "eval" / f"{name}.predictions.jsonl", rows)
        write_json(folder / "eval" / f"{name}.json", {"pearson": 0.5, "protocol": "real"})
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    (folder / "metrics.jsonl").write_text("")
    write_jsonl(folder / "predictions.jsonl", rows)
    write_json(folder / "summary.json", {"eval": {"after": {"pearson": 0.5}}})
    return folder


# Statistics


def test_estimates_are_those_of_an_evaluations_summary() -> None:
    rows = predictions(1.0, 1, missing=4)
    lines, notes = compare([evaluation("a", rows)], bootstrap=200, seed=5)
    line = by(lines, "a")
    want = summarize([r["prediction"] for r in rows], [r["label"] for r in rows], [r["prompt_id"] for r in rows], 200)
    for name in WITH_INTERVALS:
        e = line.estimates[name]
        assert e.value == pytest.approx(want[name])
        assert [e.low, e.high] == pytest.approx(want["ci95"][name], abs=0.03)  # other resamples
    assert (line.rows, line.no_score, line.compared_to, line.differences, notes) == (90, 4, None, {}, [])


def test_pairing_sees_a_difference_that_the_intervals_hide() -> None:
    good, poor = evaluation("good", predictions(0.15, 1)), evaluation("poor", predictions(0.8, 2))
    lines, _ = compare([poor, good], bootstrap=500)
    a, b = by(lines, "good"), by(lines, "poor")
    assert a.compared_to == b.compared_to == "good" and a.differences == {} and b.paired_rows == 90
    assert a.estimates["pearson"].low < b.estimates["pearson"].high
    d = b.differences["pearson"]
    assert d.value == pytest.approx(b.estimates["pearson"].value - a.estimates["pearson"].value)
    assert d.high < 0 and d.p is not None and d.p < 0.05
    apart = np.hypot(*(e.estimates["pearson"].high - e.estimates["pearson"].low for e in (a, b)))
    assert d.high - d.low < 0.8 * apart
    assert b.differences["rmse"].value > 0 and b.differences["rmse"].p < 0.05


def test_p_values_of_equals_are_spread_over_the_unit_interval(pearson_alone: None) -> None:
    """Under no difference, p below 0.05 must be rare; a bootstrap that is not joint, or doubles nothing, fails here."""
    found = []
    for i in range(60):
        pair = [evaluation("a", predictions(0.5, 2 * i, data=i)), evaluation("b", predictions(0.5, 2 * i + 1, data=i))]
        lines, _ = compare(pair, baseline="a", bootstrap=60, seed=i)
        found.append(by(lines, "b").differences["pearson"].p)
    assert np.mean([p < 0.1 for p in found]) < 0.25 and 0.3 < np.mean(found) < 0.75
    same = [evaluation("a", predictions(0.5, 1)), evaluation("b", predictions(0.5, 1))]
    d = by(compare(same, baseline="a", bootstrap=50)[0], "b").differences["pearson"]
    assert (d.value, d.low, d.high, d.p) == (0.0, 0.0, 0.0, 1.0)


def test_a_difference_is_taken_on_the_rows_that_both_have_scored() -> None:
    whole, part = predictions(0.3, 1), predictions(0.5, 2, missing=20)
    lines, _ = compare([evaluation("whole", whole), evaluation("part", part)], baseline="whole", bootstrap=50)
    d = by(lines, "part")
    label = [r["label"] for r in whole[20:]]
    values = [correlations([r["prediction"] for r in rows[20:]], label)["pearson"] for rows in (part, whole)]
    assert d.paired_rows == 70 and d.differences["pearson"].value == pytest.approx(values[0] - values[1])
    assert by(lines, "whole").estimates["pearson"].value != pytest.approx(values[1])


def answered(rows: list[dict[str, Any]], few: range) -> list[dict[str, Any]]:
    """Only some of the rows have a score, and that is the label itself."""
    return [{**row, "prediction": row["label"] if i in few else None} for i, row in enumerate(rows)]


def test_a_judge_that_answers_few_rows_wins_nothing() -> None:
    """4 of 90 rows, all of them right: neither best nor reference, and it takes nobody's rows away."""
    good = predictions(0.3, 1)
    alone, _ = compare([evaluation("good", good), evaluation("poor", predictions(1.0, 2))], bootstrap=20)
    few = evaluation("few", answered(good, range(4)))
    lines, notes = compare([few, evaluation("good", good), evaluation("poor", predictions(1.0, 2))], bootstrap=20)
    assert by(lines, "few").estimates["pearson"].value == pytest.approx(1.0)
    assert [line.compared_to for line in lines] == ["good"] * 3
    assert [(line.covered, line.used_rows) for line in lines] == [(False, 4), (True, 90), (True, 90)]
    assert by(lines, "few").coverage == pytest.approx(4 / 90) and by(lines, "few").paired_rows == 4
    assert [by(lines, m).estimates for m in ("good", "poor")] == [by(alone, m).estimates for m in ("good", "poor")]
    assert len(notes) == 1 and "few (4.44 %)" in notes[0] and "neither reference nor best" in notes[0]
    text = markdown(lines, notes, 20, None)
    row = {line.split(" | ")[1]: line for line in text.splitlines() if line.startswith("| b.jsonl")}
    assert "| 4.44 % † |" in row["few"] and "**" not in row["few"] and "| 100 % |" in row["good"]
    assert row["good"].count("**") == 8 and "†: scored fewer than 90%" in text
    assert "†" not in markdown(alone, [], 20, None)


def test_methods_are_compared_on_the_rows_that_all_have_scored() -> None:
    a, b = predictions(0.3, 1, missing=5), predictions(0.5, 2)
    b[-3:] = [{**row, "prediction": None} for row in b[-3:]]
    lines, notes = compare([evaluation("a", a), evaluation("b", b)], bootstrap=20)
    label = [row["label"] for row in a[5:-3]]
    for method, rows in (("a", a), ("b", b)):
        line, want = by(lines, method), correlations([row["prediction"] for row in rows[5:-3]], label)
        assert (line.used_rows, line.covered) == (82, True)
        assert [line.estimates[s].value for s in WITH_INTERVALS] == pytest.approx([want[s] for s in WITH_INTERVALS])
    assert by(lines, "b").paired_rows == 82
    assert notes == ["b.jsonl: numbers are of the 82 of 90 rows that a, b all scored"]


def test_a_judge_that_answers_nothing_and_judges_that_all_answer_little() -> None:
    rows = predictions(0.3, 1)
    none = evaluation("none", answered(rows, range(0)))
    few, fewer = (evaluation(f"few{n}", answered(rows, range(n))) for n in (40, 39))
    lines, _ = compare([none, few, fewer], bootstrap=10)
    assert [(line.covered, line.used_rows) for line in lines] == [(False, 0), (True, 39), (True, 39)]
    assert compare([none], bootstrap=10)[0][0].estimates["pearson"].value is None


def test_the_average_crowns_no_judge_that_answers_few_rows() -> None:
    some = [evaluation(m, predictions(n, 1, data=d), f"{d}") for d in (0, 1) for m, n in (("a", 0.5), ("b", 1.0))]
    some += [evaluation("few", answered(predictions(1, 1, data=d), range(4 if d else 90)), f"{d}") for d in (0, 1)]
    lines = [line for line in compare(some, bootstrap=10)[0] if line.benchmark == AVERAGE]
    assert [(line.method, line.covered) for line in lines] == [("a", True), ("b", True), ("few", False)]
    assert lines[2].compared_to == "a" and lines[2].estimates["pearson"].value == pytest.approx(1.0)


def test_a_baseline_that_answers_few_rows_is_named_as_such() -> None:
    few = evaluation("few", answered(predictions(0.3, 1), range(40)))
    others = [evaluation("good", predictions(0.3, 1)), evaluation("none", answered(predictions(0.3, 1), range(3)))]
    lines, notes = compare([few, *others], baseline="few", bootstrap=20)
    assert by(lines, "good").compared_to == "few" and by(lines, "good").paired_rows == 40
    assert notes[0].startswith(
        "b.jsonl: the baseline few has a score for 44.4 % of the rows alone, so it cannot be best"
    )
    assert "take another baseline" in notes[0]
    assert "few rows have a score by none (3.33 %)" in notes[1] and notes[1].endswith("neither reference nor best")
    assert "reference only where it is the --baseline" in markdown(lines, notes, 20, "few")


@pytest.mark.parametrize("order", [("part", "a", "b"), ("a", "part", "b"), ("b", "a", "part")])
def test_a_part_of_a_benchmark_is_compared_on_the_rows_in_common(order: tuple[str, ...]) -> None:
    """As --max_rows makes it: one table, whichever comes first, and no rows of the others are lost."""
    a, b = predictions(0.3, 1), predictions(0.6, 2)
    rows = {"a": a, "b": b, "part": predictions(0.4, 3)[30:60]}
    lines, notes = compare([evaluation(name, rows[name]) for name in order], bootstrap=20)
    assert [line.method for line in lines] == list(order) and {line.benchmark for line in lines} == {"b.jsonl"}
    alone, _ = compare([evaluation("a", a), evaluation("b", b)], bootstrap=20)
    assert [by(lines, m).estimates for m in "ab"] == [by(alone, m).estimates for m in "ab"]
    part = by(lines, "part")
    assert (part.rows, part.no_score, part.used_rows, part.paired_rows, part.covered) == (90, 60, 30, 30, False)
    label = [row["label"] for row in a[30:60]]
    want = [correlations([row["prediction"] for row in some], label)["pearson"] for some in (rows["part"], a[30:60])]
    assert part.estimates["pearson"].value == pytest.approx(want[0])
    assert part.differences["pearson"].value == pytest.approx(want[0] - want[1])
    assert notes[0] == (
        "b.jsonl: of its 90 rows these were asked fewer (max_rows, say), and have no score on the others: part 30"
    )


def test_two_parts_of_a_benchmark_meet_in_the_whole() -> None:
    first, second = evaluation("first", predictions(0.3, 1)[:45]), evaluation("second", predictions(0.3, 2)[45:])
    lines, _ = compare([first, second], bootstrap=5)
    assert [line.benchmark for line in lines] == ["b.jsonl", "b.jsonl [rows 2]"]  # with no row in common
    lines, _ = compare([first, second, evaluation("whole", predictions(0.3, 3))], bootstrap=5)
    assert {line.benchmark for line in lines} == {"b.jsonl"} and by(lines, "second").paired_rows == 45


def test_other_rows_are_compared_apart_and_said_so() -> None:
    short = [*predictions(0.3, 1)[:60], *predictions(0.3, 1, data=1)[60:63]]
    relabelled = [{**row, "label": 3.0 if i == 0 else row["label"]} for i, row in enumerate(predictions(0.3, 2))]
    some = [evaluation(m, rows) for m, rows in {"a": predictions(1.0, 3), "b": short, "c": relabelled}.items()]
    lines, notes = compare([*some, evaluation("d", predictions(0.4, 4))], bootstrap=20)
    assert {line.method: line.benchmark for line in lines if line.benchmark != AVERAGE} == {
        "a": "b.jsonl", "d": "b.jsonl", "b": "b.jsonl [rows 2]", "c": "b.jsonl [rows 3]",
    }  # fmt: skip
    assert by(lines, "a").compared_to == "d" and by(lines, "b", "b.jsonl [rows 2]").compared_to is None
    assert len(notes) == 2 and "63 and 90 rows, 60 ids in common" in notes[0] and notes[1].startswith("c (")


def test_the_average_over_benchmarks(pearson_alone: None) -> None:
    def one(method: str, noise: float, seed: int) -> list[Evaluation]:
        return [evaluation(method, predictions(noise, seed, data=d), f"b{d}.jsonl") for d in (0, 1)]

    only = evaluation("only", predictions(0.1, 9, data=1), "b1.jsonl")
    other = [*predictions(0.1, 9, data=1)[:60], *predictions(0.1, 9)[60:]]
    apart = evaluation("apart", other, "b1.jsonl")  # takes nobody's average away
    lines, notes = compare([*one("a", 1.5, 1), *one("b", 0.2, 3), only, apart], bootstrap=300)
    average = [line for line in lines if line.benchmark == AVERAGE]
    assert [line.method for line in average] == ["a", "b"]
    assert notes[-1].startswith("no average for only, apart: ")
    a = average[0]
    each = [by(lines, "a", f"b{d}.jsonl").estimates["pearson"] for d in (0, 1)]
    assert a.estimates["pearson"].value == pytest.approx(np.mean([e.value for e in each]))
    # The mean of two independent numbers: an interval narrower than theirs by about the square root of two.
    width = a.estimates["pearson"].high - a.estimates["pearson"].low
    assert width < 0.85 * np.mean([e.high - e.low for e in each])
    assert a.compared_to == "b" and a.paired_rows == a.rows == 180 and a.differences["pearson"].p < 0.05


def test_constants_and_single_prompts_leave_gaps_and_no_numbers(tmp_path: Path) -> None:
    constant = [{**row, "prediction": 3.0} for row in predictions(0.3, 1)]
    none = [{**row, "prediction": None} for row in predictions(0.3, 1)]
    evaluations = [evaluation(m, r) for m, r in {"c": constant, "n": none, "a": predictions(0.3, 2)}.items()]
    lines, _ = compare(evaluations, bootstrap=20)
    assert by(lines, "c").estimates["pearson"].value is None and by(lines, "c").estimates["rmse"].low is not None
    assert by(lines, "c").differences["pearson"].value is None and by(lines, "c").differences["rmse"].p is not None
    assert by(lines, "n").no_score == 90 and by(lines, "n").differences["rmse"].value is None
    comparison_plot(lines, tmp_path / "gaps.png")
    assert (tmp_path / "gaps.png").stat().st_size > 5000
    single = [[{**row, "prompt_id": "p"} for row in predictions(0.3, s)] for s in (1, 2)]
    lines, _ = compare([evaluation(str(i), rows) for i, rows in enumerate(single)], bootstrap=20)
    d = next(line for line in lines if line.differences).differences["pearson"]
    assert d.value is not None and d.low is d.p is None


def test_the_baseline_must_be_there() -> None:
    with pytest.raises(ValueError, match="baseline 'x': the methods are a, b"):
        compare([evaluation("a", predictions(1, 1)), evaluation("b", predictions(1, 2))], baseline="x")
    some = [evaluation(m, predictions(1, 1, data=d), f"{d}") for d, m in ((0, "a"), (0, "b"), (1, "b"), (1, "c"))]
    _, notes = compare(some, baseline="a", bootstrap=5)
    assert notes[0] == "1 has no evaluation of a: no differences there"
    assert notes[1:] == ["no average for a, c: not on the same rows as the others on every benchmark"]


# Finding


def test_runs_and_evaluations_are_found_and_named(tmp_path: Path) -> None:
    rows, other = predictions(0.3, 1), predictions(0.3, 1, data=1)
    trained(tmp_path / "runs" / "sft", rows, {"train": "t.jsonl", "eval": "x/b.jsonl"})
    trained(tmp_path / "runs" / "real", rows, {"train": "t.jsonl", "eval": None})
    evaluated(tmp_path / "runs" / "real" / "eval-b", rows)
    evaluated(tmp_path / "runs" / "real" / "eval-b-tract", rows, protocol="tract")
    evaluated(tmp_path / "other" / "real", other, "o.jsonl")
    trained(tmp_path / "runs" / "sft" / "stage1", rows, {"train": "t.jsonl", "eval": "x/b.jsonl"})
    unfinished = tmp_path / "runs" / "stopped"
    unfinished.mkdir()
    broken = evaluated(tmp_path / "runs" / "broken", rows)
    (broken / "predictions.jsonl").write_text("{\n{}\n")
    twice = evaluated(tmp_path / "runs" / "twice", [*rows, rows[0]])
    folders = [*sorted((tmp_path / "runs").iterdir()), tmp_path / "other"]
    found, notes = find_evaluations(folders)
    assert {(e.method, e.benchmark, e.protocol) for e in found} == {
        ("runs/real", "t.jsonl (held out)", "real"),
        ("runs/real (real, n=1)", "b.jsonl", "real"),
        ("runs/real (tract, n=1)", "b.jsonl", "tract"),
        ("sft", "b.jsonl", "real"),
        ("sft/stage1", "b.jsonl", "real"),
        ("other/real", "o.jsonl", "real"),
    }
    assert [r["id"] for r in found[0].rows] == sorted(r["id"] for r in rows)
    about = " ".join(notes)
    assert len(notes) == 3 and str(unfinished) in about and "not valid JSON" in about and str(twice) in about
    assert "twice" in about
    assert {e.source for e in find_evaluations([tmp_path / "runs"])[0]} == {
        e.source for e in found if "other" not in str(e.source)
    }


def test_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(NoEvaluationError, match="there is no such folder"):
        find_evaluations([tmp_path / "nowhere"])
    with pytest.raises(NoEvaluationError, match="holds no finished evaluation"):
        find_evaluations([tmp_path])


def test_data_of_one_file_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    rows, other = predictions(0.3, 1), predictions(0.3, 1, data=1)
    evaluated(tmp_path / "sft" / "eval-a", rows, "a/test.jsonl")
    evaluated(tmp_path / "sft" / "eval-b", other, "b/test.jsonl")
    evaluated(tmp_path / "real" / "eval-a", rows, "moved/test.jsonl")  # the rows are the same
    evaluated(tmp_path / "real" / "eval-b", other, "b/test.jsonl")
    for name in ("sft", "real"):
        (tmp_path / name / "final").mkdir()
        write_json(tmp_path / name / "final" / "real_fast.json", {})
    (tmp_path / "final").mkdir()  # as many folders have it, and no run's
    found, notes = find_evaluations([tmp_path / "sft", tmp_path / "real"])
    assert sorted((e.method, e.benchmark) for e in found) == [
        ("real", "a/test.jsonl"),
        ("real", "b/test.jsonl"),
        ("sft", "a/test.jsonl"),
        ("sft", "b/test.jsonl"),
    ]
    assert notes == []


def keyed(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """As an evaluation writes them: what a row holds is its key, whatever a file calls it."""
    return [{**row, "id": f"{name}:{i}", "key": f"k{row['id']}"} for i, row in enumerate(rows)]


def test_the_same_rows_of_two_files_are_one_benchmark(tmp_path: Path) -> None:
    """Another format gives other ids and 32-bit labels, and may have another order and another name."""
    rows, other = predictions(0.3, 1), predictions(0.9, 2)
    shuffled = [{**row, "label": float(np.float32(row["label"]))} for row in other[::-1]]
    evaluated(tmp_path / "a", keyed(rows, "bench.jsonl"), "bench.jsonl")
    evaluated(tmp_path / "b", keyed(shuffled, "bench.parquet"), "test/copy.parquet")
    evaluated(tmp_path / "c", keyed(predictions(0.3, 1, data=1), "bench.csv"), "bench.csv")  # other rows
    found, _ = find_evaluations([tmp_path])
    assert [(e.method, e.benchmark) for e in found] == [("a", "bench.jsonl"), ("b", "bench.jsonl"), ("c", "bench.csv")]
    lines, notes = compare(found, bootstrap=20)
    want = compare([evaluation("a", rows), evaluation("b", other)], bootstrap=20)[0]
    assert by(lines, "b", "bench.jsonl").differences["rmse"].value == pytest.approx(
        by(want, "b").differences["rmse"].value
    )
    assert by(lines, "b", "bench.jsonl").paired_rows == 90 and notes == [
        "no average for a, b, c: not on the same rows as the others on every benchmark"
    ]


def test_the_same_ids_do_not_make_the_same_rows(tmp_path: Path) -> None:
    """Files that number their rows give the same ids to whatever is in them."""
    rows = keyed(predictions(0.3, 1), "b.jsonl")
    evaluated(tmp_path / "a", rows)
    evaluated(tmp_path / "b", [{**row, "key": f"other {row['key']}"} for row in rows])
    lines, notes = compare(find_evaluations([tmp_path])[0], bootstrap=5)
    assert [line.benchmark for line in lines] == ["b.jsonl", "b.jsonl [rows 2]"] and "compared apart" in notes[0]


def test_rows_that_are_there_twice_stay_two(tmp_path: Path) -> None:
    rows = keyed(predictions(0.3, 1)[:6] * 2, "b.jsonl")
    evaluated(tmp_path / "a", rows)
    evaluated(tmp_path / "b", rows[:-1])
    found, _ = find_evaluations([tmp_path])
    assert in_order_of(found[0], found[0]) == found[0] and in_order_of(found[0], found[1]) is None


def test_named_benchmarks_of_one_evaluation_are_compared_one_by_one(tmp_path: Path) -> None:
    both = [
        {**row, "benchmark": name}
        for d, name in enumerate(("mt", "flask"))
        for row in keyed(predictions(0.4, 1, data=d), name)
    ]
    evaluated(tmp_path / "a", both, benchmarks={"mt": {}, "flask": {}})
    trained(tmp_path / "b", both, {"train": "t.jsonl", "eval": {"mt": "mt.jsonl", "flask": "flask.jsonl"}})
    evaluated(tmp_path / "c", keyed(predictions(0.8, 2), "x"), "mt_bench.jsonl")  # the rows of the first
    found, notes = find_evaluations([tmp_path])
    assert sorted((e.benchmark, e.method) for e in found) == [
        ("flask", "a"), ("flask", "b"), ("mt", "a"), ("mt", "b"), ("mt", "c"),
    ]  # fmt: skip
    assert notes == [] and all(len(e.rows) == 90 for e in found)
    lines, _ = compare(found, bootstrap=10)
    assert {line.method for line in lines if line.benchmark == AVERAGE} == {"a", "b"}
    assert len(pool_seeds(found)[0]) == 5


def test_splits_of_a_hub_dataset_are_benchmarks_of_their_own(tmp_path: Path) -> None:
    rows, other = predictions(0.3, 1), predictions(0.3, 1, data=1)
    for split, some in (("test", rows), ("hard", other)):
        folder = evaluated(tmp_path / f"eval-{split}", some)
        summary = json.loads((folder / "summary.json").read_text()) | {"data": "me/judgements", "split": split}
        write_json(folder / "summary.json", summary)
    trained(tmp_path / "real", rows, {"train": "me/judgements", "eval": "me/judgements", "eval_split": "test"})
    found, _ = find_evaluations([tmp_path])
    assert sorted((e.method, e.benchmark) for e in found) == [
        ("eval-hard", "judgements (hard)"),
        ("eval-test", "judgements (test)"),
        ("real", "judgements (test)"),
    ]


def test_data_that_is_a_path_with_more_beside_it_is_named_by_the_path(tmp_path: Path) -> None:
    data = {"path": "me/judgements", "split": "hard"}
    trained(tmp_path / "real", predictions(0.3, 1), {"train": "t.jsonl", "eval": data, "eval_split": "test"})
    assert find_evaluations([tmp_path])[0][0].benchmark == "judgements (hard)"


def test_tract_is_compared_on_the_data_of_its_first_stage(tmp_path: Path) -> None:
    rows = predictions(0.3, 1)
    trained(tmp_path / "sft", rows, {"train": "t.jsonl", "eval": "x/b.jsonl"})
    own = {"train": str(tmp_path / "tract/self_generated.jsonl"), "eval": str(tmp_path / "tract/held_out.jsonl")}
    trained(tmp_path / "tract", rows, own)
    trained(tmp_path / "tract" / "stage1", rows, {"train": "t.jsonl", "eval": "x/b.jsonl"})
    found, _ = find_evaluations([tmp_path])
    assert {(e.method, e.benchmark) for e in found} == {(m, "b.jsonl") for m in ("sft", "tract", "tract/stage1")}


def test_files_and_overwritten_runs_are_left_out(tmp_path: Path) -> None:
    rows, data = predictions(0.3, 1), {"train": "t.jsonl", "eval": "b.jsonl"}
    for name in ("real", "real.old-1", "sft.old-2"):
        trained(tmp_path / name, rows, data)
    (tmp_path / "notes.txt").write_text("mine")
    found, notes = find_evaluations(sorted(tmp_path.iterdir()))
    assert [e.method for e in found] == ["real", "sft.old-2"]  # no newer sft is there
    assert len(notes) == 2 and "notes.txt is a file" in notes[0] and "real.old-1" in notes[1]


# Seeds


def seeds(method: str, noises: list[float], first: int = 0) -> list[Evaluation]:
    """Runs of a method whose names do not tell the seed."""
    return [
        replace(evaluation(method, predictions(noise, first + s)), source=Path(f"{method}-{s}"), seed=s)
        for s, noise in enumerate(noises)
    ]


def test_a_method_with_seeds_is_the_mean_of_its_runs() -> None:
    runs = seeds("real", [0.3, 0.6, 2.0])
    alone = [by(compare([run], bootstrap=400)[0], "real") for run in runs]
    lines, _ = compare([*runs, evaluation("sft", predictions(1.0, 9))], baseline="sft", bootstrap=400)
    pooled = by(lines, "real")
    assert (pooled.seeds, pooled.rows, by(lines, "sft").seeds) == (3, 90, 1)
    for name in WITH_INTERVALS:
        values = [line.estimates[name].value for line in alone]
        assert pooled.estimates[name].value == pytest.approx(np.mean(values))


def test_the_spread_of_the_seeds_is_in_the_interval() -> None:
    """The resamples' variance is that of a mean over n seeds, unbiased, where the prompts vary little."""
    values = np.array([0.2, 0.5, 0.9])
    runs = [{name: np.full(20000, value) for name in WITH_INTERVALS} for value in values]
    drawn = drawn_seeds(runs, 0)["pearson"]
    assert drawn.mean() == pytest.approx(values.mean(), abs=0.01)
    assert drawn.var() == pytest.approx(values.var(ddof=1) / 3, rel=0.03)


def test_a_seed_without_a_correlation_is_said() -> None:
    runs = seeds("real", [0.3, 0.6])
    runs[1] = replace(runs[1], rows=[{**row, "prediction": 3.0} for row in runs[1].rows])
    lines, notes = compare([*runs, evaluation("sft", predictions(1.0, 9))], bootstrap=20)
    assert by(lines, "real").estimates["pearson"].value is None and by(lines, "real").estimates["rmse"].value
    assert notes == ["b.jsonl: real has no correlation on seed 1, and so none on average"]


def test_the_seeds_of_two_methods_are_drawn_in_pairs(pearson_alone: None) -> None:
    """Each run a little better than the one that it started from: seen only where the seeds are drawn together."""
    start, after = seeds("start", [0.8, 1.4, 3.0]), seeds("after", [0.3, 0.9, 2.2])
    lines, _ = compare([*start, *after], baseline="start", bootstrap=200)
    d = by(lines, "after").differences["pearson"]
    assert d.low > 0 and d.p < 0.05
    shuffled = [replace(run, seed=2 - run.seed) for run in after]
    d = by(compare([*start, *shuffled], baseline="start", bootstrap=200)[0], "after").differences["pearson"]
    assert d.low < 0
    # Whatever order they come in; and a seed that one of them lacks is no pair.
    d, e = (
        by(compare([*start, *runs], baseline="start", bootstrap=200)[0], "after").differences["pearson"]
        for runs in (after[::-1], after)
    )
    assert d == e
    lines, notes = compare([*start, after[0], after[2]], baseline="start", bootstrap=200)
    each = [by(compare([run], bootstrap=5)[0], run.method).estimates["pearson"].value for run in (*start, *after)]
    found = by(lines, "after").differences["pearson"]
    assert found.value == pytest.approx((each[3] + each[5] - each[0] - each[2]) / 2) and found.low > 0
    assert notes == ["b.jsonl: the difference of after and start is that of the seeds of both"]


def test_rows_without_a_score_are_counted_over_the_seeds() -> None:
    runs = [replace(run, rows=predictions(0.5, i, missing=3 * i)) for i, run in enumerate(seeds("real", [0.5] * 3))]
    lines, _ = compare([*runs, evaluation("sft", predictions(1.0, 9))], baseline="sft", bootstrap=20)
    assert by(lines, "real").no_score == 9 and by(lines, "real").paired_rows == 84


def test_runs_that_differ_by_their_seed_alone_are_found(tmp_path: Path) -> None:
    for seed in (2, 0, 1):
        folder = tmp_path / "runs" / f"real-{seed}"
        # As TRACT's second stage has them: rows, benchmarks and template in the run's own folder.
        data = {"eval": {"b": f"{folder}/held_out.b.jsonl"}, "train": f"{folder}/rows.jsonl"}
        trained(folder, predictions(0.5, seed), data)
        (folder / "stage1").mkdir()
        (folder / "stage1" / "config.yaml").write_text(yaml.safe_dump({"data": {"eval": "b.jsonl"}}))
        config = yaml.safe_load((folder / "config.yaml").read_text()) | {
            "seed": seed, "output": str(folder), "init_from": f"runs/sft-{seed}", "optim": {"lr": 1e-5},
            "run_name": f"real-{seed}-stage2", "model": "m/judge-1",
            "prompt": {"template": f"{folder}/stage1/final/judge_template.jinja"},
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        other = tmp_path / "runs" / f"rate-{seed}"
        trained(other, predictions(0.5, seed), {"eval": "b.jsonl"})
        config |= {"output": str(other), "data": {"eval": "b.jsonl"}, "optim": {"lr": 1e-5 * (1 + seed)}}
        (other / "config.yaml").write_text(yaml.safe_dump(config))
        evaluated(folder / "tract", predictions(0.5, seed), protocol="tract")  # a second protocol
    found, notes = pool_seeds(find_evaluations([tmp_path / "runs"])[0])
    assert sorted((e.method, e.seed) for e in found if "real" in e.method) == [
        (f"real ({protocol}, n=1)", seed) for protocol in ("real", "tract") for seed in range(3)
    ]
    # Another learning rate is another method, whatever the folders' names end with.
    assert sorted((e.method, e.seed) for e in found if "rate" in e.method) == [(f"rate-{s}", None) for s in range(3)]
    assert notes == []
    output = tmp_path / "out"
    assert main([str(tmp_path / "runs"), "--pool-seeds", "--bootstrap", "20", "--output", str(output)]) == 0
    table = (output / "comparison.md").read_text()
    assert "| b.jsonl | real (tract, n=1) | tract | 3 | 90 |" in table and "| seeds |" in table


@pytest.mark.parametrize("other", ["real-2 and real-3 at another rate", "a folder real"])
def test_runs_of_other_settings_never_share_a_name(tmp_path: Path, other: str) -> None:
    rates = {"real-0": (0, 1.0), "real-1": (1, 1.0)}
    rates |= {"real": (0, 2.0)} if other == "a folder real" else {"real-2": (2, 2.0), "real-3": (3, 2.0)}
    for name, (seed, rate) in rates.items():
        folder = trained(tmp_path / "runs" / name, predictions(0.5, seed), {"eval": "b.jsonl"})
        config = {"data": {"eval": "b.jsonl"}, "seed": seed, "output": str(folder), "optim": {"lr": rate}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    found, notes = pool_seeds(find_evaluations([tmp_path / "runs"])[0])
    assert sorted(e.method for e in found) == sorted(rates) and all(e.seed is None for e in found)
    assert "real-0, real-1 are not pooled" in notes[0]


# The command


def test_the_command_writes_a_table_a_csv_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(tmp_path / "re|al", predictions(0.2, 1))
    evaluated(tmp_path / "sft", predictions(1.5, 2, missing=3))
    evaluated(tmp_path / "alone", predictions(1.5, 2)[:50])
    (tmp_path / "empty").mkdir()
    output = tmp_path / "out"
    argv = [*(str(tmp_path / name) for name in ("re|al", "sft", "alone", "empty")), "--output", str(output)]
    assert main([*argv, "--bootstrap", "50"]) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip() == (output / "comparison.md").read_text().rstrip()
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == 5 and len({line.replace("\\|", "").count("|") for line in table}) == 1
    real, sft = table[2], table[3]
    assert "re\\|al" in real and "reference" in real and "**" in real
    assert "87 of 90" in sft and "p = 0.0" in sft and "**" not in sft
    assert "of its 90 rows these were asked fewer" in printed and "empty holds no finished evaluation" in printed
    with (output / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * len(WITH_INTERVALS)
    line = next(d for d in lines if (d["method"], d["statistic"]) == ("sft", "kendall"))
    assert float(line["low"]) < float(line["value"]) < float(line["high"])
    assert float(line["difference"]) < 0 and line["reference"] == "re|al" and line["paired_rows"] == "87"
    assert len(np.unique(plt.imread(output / "comparison.png").reshape(-1, 4), axis=0)) > 20
    assert "seeds" not in printed
    # An earlier comparison is kept.
    before = (output / "comparison.md").read_text()
    assert main([*argv, "--bootstrap", "5"]) == 2
    assert "already holds comparison.md" in capsys.readouterr().err
    assert (output / "comparison.md").read_text() == before
    assert main([*argv, "--bootstrap", "5", "--overwrite", "--baseline", "sft"]) == 0
    assert "`sft`" in capsys.readouterr().out


def test_mistakes_of_the_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(evaluated(tmp_path / "a", predictions(0.2, 1)))
    output = ["--output", str(tmp_path / "o")]
    for argv, message in {
        (str(tmp_path / "none"),): "no such folder",
        (folder, "--bootstrap", "0"): "bootstrap is 0: it must be above 0",
        (folder, "--baseline", "x"): "no evaluation of the baseline 'x'",
    }.items():
        assert main([*argv, *output]) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "o" / "comparison.md").exists()
    assert json.loads((Path(folder) / "summary.json").read_text())["data"] == "some/where/b.jsonl"
