from __future__ import annotations

import itertools
import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from real_fast.evaluation.metrics import CORRELATIONS, calibration, correlations, summarize, table

FEW_VALUES = st.lists(
    st.tuples(st.sampled_from([0.5, 1.0, 2.0, 3.25, 4.0]), st.sampled_from([1.0, 2.0, 3.0])), min_size=3, max_size=12
)


def judged(n_prompts: int, per_prompt: int, seed: int = 0) -> tuple[list[float], list[float], list[str]]:
    """Predictions whose error has a part that all responses to a prompt share."""
    rng = np.random.default_rng(seed)
    labels = rng.uniform(1, 5, (n_prompts, per_prompt))
    predicted = labels + rng.normal(size=(n_prompts, 1)) + 0.5 * rng.normal(size=labels.shape)
    groups = [f"p{i}" for i in range(n_prompts) for _ in range(per_prompt)]
    return predicted.ravel().tolist(), labels.ravel().tolist(), groups


def kendall_by_pairs(x: list[float], y: list[float]) -> float:
    both = [(np.sign(a - c), np.sign(b - d)) for (a, b), (c, d) in itertools.combinations(zip(x, y, strict=True), 2)]
    untied_x, untied_y = sum(s != 0 for s, _ in both), sum(t != 0 for _, t in both)
    return float(sum(s * t for s, t in both) / math.sqrt(untied_x * untied_y))


@given(FEW_VALUES)
@settings(deadline=None, max_examples=60)
def test_correlations_by_their_definitions_ties_included(pairs: list[tuple[float, float]]) -> None:
    x, y = [p for p, _ in pairs], [t for _, t in pairs]
    found = correlations(x, y)
    error = np.array(x) - np.array(y)
    assert found["rmse"] == pytest.approx(math.sqrt(sum(e * e for e in error) / len(error)))
    assert found["mae"] == pytest.approx(sum(abs(e) for e in error) / len(error))
    assert found["bias"] == pytest.approx(sum(error) / len(error))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert [found[name] for name in CORRELATIONS] == [None] * 3
        return
    assert found["reasons"] == {}
    assert found["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])
    assert found["kendall"] == pytest.approx(kendall_by_pairs(x, y))


@pytest.mark.parametrize(
    ("predicted", "label", "reason"),
    [
        ([3.0] * 4, [1, 2, 3, 4], "all predictions are equal"),
        ([0.1 + 0.2, 0.3, 0.3, 0.3], [1, 2, 3, 4], "all predictions are equal"),
        ([1, 2, 3, 4], [5, 5, 5, 5], "all labels are equal"),
        ([0.0] * 4, [0.0] * 4, "all predictions are equal"),
        ([1, 2], [1, 2], "2 rows with a score: at least 3 are needed"),
        ([], [], "0 rows with a score: at least 3 are needed"),
    ],
)
def test_what_cannot_be_computed_is_none_with_a_reason(predicted: list[float], label: list[float], reason: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = correlations(predicted, label)
    assert {name: found[name] for name in CORRELATIONS} == dict.fromkeys(CORRELATIONS)
    assert {name: found["reasons"][name] for name in CORRELATIONS} == dict.fromkeys(CORRELATIONS, reason)
    assert (found["rmse"] is None) == (not predicted) == ("rmse" in found["reasons"])
    json.dumps(found, allow_nan=False)


def test_correlations_refuse_what_is_not_a_number() -> None:
    with pytest.raises(ValueError, match="not a finite number"):
        correlations([1.0, math.nan, 2.0], [1, 2, 3])
    with pytest.raises(ValueError, match="one length"):
        correlations([1.0, 2.0], [1, 2, 3])


def test_rows_without_a_score_are_counted_and_left_out() -> None:
    predicted = [1.0, None, 2.5, math.nan, 4.5, 3.0]
    label = [1.0, 5.0, 2.0, 5.0, 5.0, 2.0]
    found = summarize(predicted, label, list("abcdef"), bootstrap=50, seed=1)
    assert (found["n"], found["n_scored"], found["no_score"]) == (6, 4, 2)
    alone = correlations([1.0, 2.5, 4.5, 3.0], [1.0, 2.0, 5.0, 2.0])
    assert all(found[name] == alone[name] for name in (*CORRELATIONS, "rmse", "mae", "bias"))
    # Resamples in which fewer than 3 scored rows, or equal ones, were drawn have no correlation.
    assert 0 < found["constant_resamples"]["pearson"] < 25
    json.dumps(found, allow_nan=False)


def test_interval_is_the_bootstrap_over_whole_prompts() -> None:
    predicted, label, groups = judged(12, 3)
    found = summarize(predicted, label, groups, bootstrap=200, seed=7)
    names = sorted(set(groups))
    rows = {name: [i for i, g in enumerate(groups) if g == name] for name in names}
    rng = np.random.default_rng(7)
    values = []
    for _ in range(200):
        chosen = [i for g in rng.integers(0, 12, 12) for i in rows[names[g]]]
        values.append(stats.pearsonr(np.array(predicted)[chosen], np.array(label)[chosen]).statistic)
    assert found["ci95"]["pearson"] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist())
    for name, (low, high) in found["ci95"].items():
        assert low <= found[name] <= high
    assert summarize(predicted, label, groups, 200, 7) == found
    assert summarize(predicted, label, groups, 200, 8)["ci95"] != found["ci95"]


def test_repeating_rows_within_their_prompts_adds_no_certainty() -> None:
    predicted, label, groups = judged(20, 2)
    once = summarize(predicted, label, groups, 300, 0)["ci95"]
    again = summarize(predicted * 4, label * 4, groups * 4, 300, 0)["ci95"]
    assert again["pearson"] == pytest.approx(once["pearson"])
    assert again["rmse"] == pytest.approx(once["rmse"])
    as_new_prompts = [f"{g}-{copy}" for copy in range(4) for g in groups]
    fooled = summarize(predicted * 4, label * 4, as_new_prompts, 300, 0)["ci95"]
    assert np.ptp(fooled["rmse"]) < 0.7 * np.ptp(once["rmse"])


def test_shared_errors_of_a_prompt_widen_the_interval() -> None:
    predicted, label, groups = judged(30, 8)
    by_prompt = summarize(predicted, label, groups, 300, 0)["ci95"]["rmse"]
    by_row = summarize(predicted, label, [str(i) for i in range(240)], 300, 0)["ci95"]["rmse"]
    assert np.ptp(by_prompt) > 1.5 * np.ptp(by_row)


def test_no_interval_from_one_prompt_or_mostly_constant_resamples() -> None:
    one = summarize([1.0, 2.0, 3.0], [1.0, 2.0, 2.0], ["p"] * 3, 50)
    assert one["ci95"]["pearson"] is None and "two prompts" in one["reasons"]["ci95"]
    # Three prompts, one of them different: 8 of 27 resamples lack it, one holds nothing else.
    some = summarize([1.0, 1.0, 2.0], [1.0, 2.0, 3.0], list("abc"), 400)
    assert some["ci95"]["pearson"] is not None
    assert some["constant_resamples"]["pearson"] == pytest.approx(400 * 9 / 27, abs=50)
    assert some["constant_resamples"]["rmse"] == 0
    # Among 23 prompts with 3 scored rows, about 65 % of the resamples miss one of the two rows that make a difference.
    nothing: list[float | None] = [None] * 20
    few = summarize([1.0, 1.0, 2.0, *nothing], [1.0, 2.0, 2.0, *[4.0] * 20], [str(i) for i in range(23)], 400)
    assert few["pearson"] == pytest.approx(0.5)
    assert few["ci95"]["pearson"] is None
    assert (
        few["reasons"]["ci95.pearson"]
        == f"{few['constant_resamples']['pearson']} of 400 resamples are constant or too small"
    )
    assert few["ci95"]["rmse"] is not None
    json.dumps(few, allow_nan=False)


def test_nothing_scored() -> None:
    found = summarize([None, None], [1.0, 2.0], ["a", "b"], 10)
    assert (found["n"], found["no_score"], found["rmse"], found["ci95"]["rmse"]) == (2, 2, None, None)
    assert found["reasons"]["rmse"] == "no row has a score"


def test_calibration_bins() -> None:
    values = [1, 2, 3]
    sure = np.eye(3)
    distribution = np.concatenate([sure[[0] * 10], sure[[2] * 10], [[0, 0.5, 0]] * 10])  # the last: half off the scale
    labels = [1.0] * 5 + [2.0] * 5 + [3.0] * 10 + [2.0] * 10
    found = calibration(distribution, values, labels, bins=3)
    assert [b["n"] for b in found["bins"]] == [20, 10]  # 1.0 and 0.5 * 2 are equal predictions, and share a bin
    assert [b["predicted"] for b in found["bins"]] == [1.0, 3.0]
    assert [b["label"] for b in found["bins"]] == [1.75, 3.0]
    assert found["bins"][0]["label_se"] == pytest.approx(np.std(labels[:10] + labels[20:], ddof=1) / math.sqrt(20))
    assert found["error"] == pytest.approx(20 / 30 * 0.75)
    assert found["label_probability"] == pytest.approx((5 * 1 + 5 * 0 + 10 * 1 + 10 * 0.5) / 30)


@pytest.mark.parametrize(("n", "sizes"), [(100, [10] * 10), (23, [6, 5, 6, 6]), (3, [3])])
def test_calibration_bins_hold_about_equally_many_rows(n: int, sizes: list[int]) -> None:
    high = np.random.default_rng(0).permutation(n) / n
    found = calibration(np.stack([1 - high, high], axis=1), [1, 2], 1 + high)
    assert sorted(b["n"] for b in found["bins"]) == sorted(sizes)
    assert [b["predicted"] for b in found["bins"]] == sorted(b["predicted"] for b in found["bins"])
    assert found["error"] == pytest.approx(0, abs=1e-12)


def test_label_between_two_scores_counts_both() -> None:
    found = calibration([[0.2, 0.6]], [1, 2], [1.5])
    assert found["label_probability"] == pytest.approx(0.4)
    assert found["bins"][0]["label_se"] is None
    assert calibration([[0.2, 0.6]], [1, 2], [4 / 3])["label_probability"] == pytest.approx(0.2)


def test_calibration_of_nothing_and_of_wrong_shapes() -> None:
    assert calibration([], [1, 2], []) == {"bins": [], "error": None, "label_probability": None}
    with pytest.raises(ValueError, match="shape"):
        calibration([[0.5, 0.5]], [1, 2, 3], [1])


def test_table_shows_both_readings_and_reasons() -> None:
    predicted, label, groups = judged(10, 3)
    summary = summarize(predicted, label, groups, 50) | {"decoded": summarize([3.0] * 30, label, groups, 50)}
    lines = table(summary).splitlines()
    assert lines[0].split() == ["RAIL", "decoded"]
    pearson = next(line for line in lines if line.startswith("pearson"))
    assert f"{summary['pearson']:.3f} [{summary['ci95']['pearson'][0]:.3f}, " in pearson
    assert "none: all predictions are equal" in pearson
    assert not any(line.startswith(("off-scale", "truncated")) for line in lines)  # a summary of an earlier version
    lines = table(summary | {"off_scale_mass": 0.9997, "truncated": 0.25}).splitlines()
    assert [line.split() for line in lines[-2:]] == [["off-scale", "mass", "1.000"], ["truncated", "0.250"]]
