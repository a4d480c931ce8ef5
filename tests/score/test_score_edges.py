"""Score distributions at the edges, from a data file to a trained judge: nothing rounded, nothing divided by zero."""

from __future__ import annotations

import json

import pytest
import torch

from real_fast.train import main
from real_fast.utils.jsonio import read_jsonl
from real_kernels import label_weights, reward_terms
from tests.helpers import flags

SCALES = {
    "thirds": ([1, 2, 3, 4, 5], lambda i: [4.0, 13 / 3, 14 / 3, 1.0, 7 / 3][i % 5]),
    "0 to 9": (list(range(10)), lambda i: float(i % 10)),
    "a gap": ([1, 3, 5], lambda i: [1.0, 2.0, 3.0, 4.5, 5.0][i % 5]),
    "all fives": ([1, 2, 3, 4, 5], lambda i: 5.0),
}


def write_rows(path, label_of, n=16, **more):
    rows = [
        {"id": str(i), "instruction": f"Name {i} things.", "response": "a, b", "rubric": "Count.", "feedback": "Fine."}
        | {k: v(i) for k, v in more.items()}
        | ({} if "scores" in more else {"score": label_of(i)})
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train(tiny_judge, tmp_path, data, values, *more):
    output = tmp_path / "run"
    short = ["--train.steps", "2", "--warmup.steps", "1", "--data.max_eval", "6", "--data.eval", str(data)]
    scale = ["--scale.values", json.dumps(values)]
    assert main(flags(tiny_judge, output, "--data.train", str(data), *short, *scale, *more)) == 0
    return output


@pytest.mark.parametrize(
    ("method", "name"),
    [("real", name) for name in SCALES] + [("raft", "a gap"), ("binary_rl", "thirds"), ("binary_rl", "all fives")],
)
def test_every_scale_trains_and_evaluates(tiny_judge, tmp_path, method, name):
    values, label_of = SCALES[name]
    data = write_rows(tmp_path / "rows.jsonl", label_of)
    output = train(tiny_judge, tmp_path, data, values, "--method", method, "--supervised.prompts_per_step", "3")
    lines = [m for m in read_jsonl(output / "metrics.jsonl") if m["phase"] == method]
    assert len(lines) == 2 and all(m["loss"] is not None and m["score/rmse"] > 0 for m in lines)
    predictions = read_jsonl(output / "predictions.jsonl")
    labels = {str(i): label_of(i) for i in range(16)}
    assert all(p["label"] == pytest.approx(labels[p["id"]]) for p in predictions)
    assert [float(k) for k in predictions[0]["distribution"]] == [float(v) for v in values]
    summary = json.loads((output / "summary.json").read_text(), parse_constant=pytest.fail)
    after = summary["eval"]["after"]
    # A correlation with a constant is not defined, and is not made up; the error is.
    assert (after["pearson"] is None) == (name == "all fives") and after["rmse"] > 0
    assert not read_jsonl(output / "rejected.jsonl")


def test_noisy_raters_are_averaged_exactly(tiny_judge, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", None, scores=lambda i: [[4, 4, 5], [1, 2, 2], [3, 5]][i % 3])
    output = train(tiny_judge, tmp_path, data, [1, 2, 3, 4, 5])
    means = [13 / 3, 5 / 3, 4.0]
    for p in read_jsonl(output / "predictions.jsonl"):
        assert p["label"] == pytest.approx(means[int(p["id"]) % 3], abs=1e-12)


def test_labels_off_the_scale_are_rejected_by_value(tiny_judge, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", lambda i: [0.0, 3.0, 5.5, 5.0][i % 4])
    output = train(tiny_judge, tmp_path, data, [1, 3, 5], "--data.max_rejected", "1")  # half of them
    rejected = read_jsonl(output / "rejected.jsonl")
    assert {r["row"]["score"] for r in rejected} == {0.0, 5.5}
    assert len({r["id"] for r in rejected}) == 8


@pytest.mark.parametrize("label", [1.0, 4 / 3, 2.0, 3.0, 4.999, 5.0])
def test_interpolation_over_a_gap(label):
    """The label's weights on 1, 3, 5 have the label as their mean, on its two neighbours alone."""
    values = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64)
    q = label_weights(torch.tensor([label], dtype=torch.float64), values)[0]
    assert float(q @ values) == pytest.approx(label) and float(q.sum()) == pytest.approx(1)
    assert (q >= 0).all() and int((q > 0).sum()) == (1 if label in (1.0, 3.0, 5.0) else 2)
    logp = torch.log(torch.tensor([[0.2, 0.3, 0.4]], dtype=torch.float64))
    terms = reward_terms(logp, values, torch.tensor([label], dtype=torch.float64))
    assert float(terms.expected_score) == pytest.approx(0.2 + 0.9 + 2.0)
    assert float(terms.reward) == pytest.approx(-((3.1 - label) ** 2) + float(q @ logp[0]))
