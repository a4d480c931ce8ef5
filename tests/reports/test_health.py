"""The health figures and the HTML report of a run."""

from __future__ import annotations

import re

import pytest

from real_fast import evaluate
from real_fast.reports import health, html, report


def prediction(i, label, score):
    p = {"1": 0.2, "2": 0.3, "3": 0.4}
    feedback = f"<b>feedback {i}</b> & more"
    return {"id": f"row-{i}", "label": label, "prediction": score, "distribution": p, "feedback": feedback}


ROWS = [prediction(i, 1 + i % 3, 1.5 + 0.1 * (i % 7)) for i in range(20)] + [prediction(99, 3.0, 0.1)]
ROLLOUTS = [
    {
        "step": s,
        "id": "a<b",
        "label": 2.0,
        "expected_score": 1.5,
        "reward": None,
        "advantage": 0.5,
        "distribution": None,
        "text": "<script>",
    }
    for s in (1, 11)
]
METRICS = [
    {"step": t, "score/off_scale_mass": 0.5, "reward_std": 1.0, "completions/mean_length": 20.0, "grad_norm": None}
    for t in range(1, 9)
]


def test_figures(tmp_path):
    health.health_curves(METRICS, tmp_path / "health.png")
    health.health_curves([], tmp_path / "empty.png")
    health.score_histogram({"before": ROWS, "after": ROWS}, tmp_path / "histogram.png")
    assert all((tmp_path / f"{n}.png").read_bytes()[:4] == b"\x89PNG" for n in ("health", "empty", "histogram"))
    with pytest.raises(ValueError, match="no predictions"):
        health.score_histogram({"after": []}, tmp_path / "none.png")


def test_warnings_name_the_number_and_what_to_do():
    (warning,) = html.health_warnings(METRICS)
    assert "score/off_scale_mass is 0.5 over the last 5 steps" in warning and "warm up longer" in warning
    assert html.health_warnings([]) == []
    # The KL is measured now and then, and on the last step.
    far = [{"step": t, "kl": 0.9 if t == 8 else None} for t in range(1, 9)]
    (warning,) = html.health_warnings(far)
    assert warning.startswith("kl is 0.9 on the last step: ") and "objective.kl_coef" in warning
    assert html.health_warnings([{"step": 1, "kl": 0.1}]) == []
    assert html.health_warnings([{**m, "score/off_scale_mass": 0.01} for m in METRICS]) == []


SUMMARY = {
    "protocol": "real", "n": 20, "no_score": 3, "off_scale_mass": 0.9997, "truncated": 0.75, "not_finite": 1,
}  # fmt: skip


def test_an_evaluations_warnings():
    mass, cut, missing, broken = health.evaluation_warnings(SUMMARY)
    assert "off-scale mass is 1: " in mass and "scale.phrase" in mass
    assert "75% of the feedback is cut off: raise rollout.max_tokens" in cut
    assert missing.startswith("3 of 20 rows have no score") and "1 feedbacks are not numbers" in broken
    well = SUMMARY | {"no_score": 0, "off_scale_mass": 0.05, "truncated": 0.1, "not_finite": 0}
    assert health.evaluation_warnings(well) == []
    # One token is all that raft samples, and decode reads no probability.
    assert health.evaluation_warnings(well | {"protocol": "raft", "truncated": 1.0}) == []
    assert health.evaluation_warnings(well | {"protocol": "decode", "off_scale_mass": 1.0}) == []
    several = {"n": 40, "no_score": 0, "benchmarks": {"mt": well, "flask": SUMMARY}}
    assert [said.split(":")[0] for said in health.evaluation_warnings(several)] == ["flask"] * 4


def test_warnings_go_to_the_terminal(capsys, monkeypatch, tmp_path):
    report.print_warnings(METRICS, SUMMARY)
    said = capsys.readouterr().out
    assert (
        "warning: score/off_scale_mass is 0.5 over the last 5 steps" in said and "warning: off-scale mass is 1" in said
    )
    report.print_warnings([], None)
    assert capsys.readouterr().out == ""
    x = {"pearson": None, "spearman": None, "kendall": None, "rmse": 1.0, "mae": 1.0, "bias": 0.0, "ci95": {}}
    x |= {"n_scored": 17, "n": 20, "reasons": {}}
    monkeypatch.setattr(evaluate, "run", lambda config: {**x, **SUMMARY, "decoded": x, "rejected": 0})
    model = str(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert evaluate.main(["--model", model, "--data", "d.jsonl", "--output", model]) == 0
    said = capsys.readouterr().out
    assert "off-scale mass" in said and "truncated" in said and said.count("warning: ") == 4


def test_the_page_stands_alone_and_escapes_what_models_write(tmp_path):
    health.health_curves(METRICS, tmp_path / "health.png")
    (tmp_path / "config.yaml").write_text("model: <tiny>\n")
    evaluation = {"n": 21, "pearson": 0.5, "rmse": None, "ci95": {"pearson": [0.4, 0.6]}}
    summary = {
        "model": "tiny", "method": "real", "steps": 8, "train_rows": 9, "seed": 0, "rejected_rows": 0,
        "skipped_steps": 0, "eval": {"before": None, "after": evaluation},
    }  # fmt: skip
    html.write(tmp_path, summary, METRICS, ROWS, ROLLOUTS)
    page = (tmp_path / "report.html").read_text()
    assert "Newest rollouts (update 11)" in page and page.count("a&lt;b") == 1 and "<script>" not in page
    assert "0.500 [0.400, 0.600]" in page and "data:image/png;base64," in page
    assert "<b>feedback" not in page and "&lt;b&gt;feedback 99&lt;/b&gt; &amp; more" in page
    assert re.findall(r"<td>(row-\d+)", page)[0] == "row-99"  # the largest error first
    assert not re.search(r"(src|href)=[\"']https?:", page) and "&lt;tiny&gt;" in page
