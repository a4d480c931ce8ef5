"""One run on several numbers of ranks: how two of them are compared, on folders made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import same_run
from real_fast.utils.jsonio import write_json, write_jsonl
from tools.scaling_tables import same_table


def leave(folder: Path, texts: list[str], shift: float) -> None:
    """A run of one update, and its evaluations, with predictions moved by `shift`."""
    (folder / "eval").mkdir(parents=True)
    write_json(folder / "summary.json", {})
    found = {"n": 1, "ci95": {key: [0.1, 0.9] for key in ("pearson", "spearman", "rmse")}}
    found |= {"pearson": 0.5, "spearman": 0.5, "rmse": 1.0 + shift}
    lines: list[dict[str, Any]] = [{"phase": "eval", "name": name, "eval": found} for name in same_run.EVALUATIONS]
    lines += [{"phase": "warmup", "loss": 2.0}, {"phase": "real", "reward": -1.0, "loss": 0.5}]
    write_jsonl(folder / "metrics.jsonl", lines)
    write_jsonl(folder / "rollouts.jsonl", [{"step": 7, "id": 0, "rollout": i, "text": t} for i, t in enumerate(texts)])
    for name in same_run.EVALUATIONS:
        write_jsonl(folder / "eval" / f"{name}.predictions.jsonl", [{"id": "a", "prediction": 3.0 + shift}])


def test_runs_are_compared_by_texts_and_predictions(tmp_path: Path) -> None:
    leave(tmp_path / "ranks-1", ["good", "bad"], 0.0)
    leave(tmp_path / "ranks-2", ["good", "poor"], 0.25)
    assert same_run.main([str(tmp_path), "--output", str(tmp_path / "found.json")]) == 0
    report = json.loads((tmp_path / "found.json").read_text("utf-8"))
    second = report["runs"][1]
    assert (second["rollouts"], second["same_texts"], second["parted"]) == (2, 1, 7)
    assert second["largest_difference"] == dict.fromkeys(same_run.EVALUATIONS, 0.25)
    assert "| 2 | 0.500 [0.10, 0.90] |" in same_table(report) and "1 of 2 | 0.2 |" in same_table(report)


def test_a_run_that_fails_is_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="on 1 ranks ended with status 2"):
        same_run.launch(1, tmp_path / "x", "configs/quickstart.yaml", ["--train.steps", "many"])
