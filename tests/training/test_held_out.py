"""Evaluations while training say on the terminal what is wrong, where somebody may still stop the run."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from real_fast.config import Config
from real_fast.evaluation.run import EvalResult
from real_fast.training.held_out import evaluate_held_out


@pytest.mark.parametrize(("name", "warned"), [("before", False), ("warmup", True), ("step-000010", True)])
def test_an_evaluation_that_looks_wrong_is_said(
    name: str, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    summary = {"protocol": "real", "n": 3, "off_scale_mass": 0.9, "truncated": 0.0, "no_score": 0}
    monkeypatch.setattr("real_fast.training.held_out.evaluate", lambda *_, **__: EvalResult([], summary))
    run: Any = SimpleNamespace(
        writes=True, folder=SimpleNamespace(save_evaluation=lambda *_: None), log=lambda *_: None
    )
    nothing: Any = None
    with caplog.at_level(logging.WARNING):
        evaluate_held_out(name, 10, run, nothing, [], nothing, Config(), lambda: None)
    assert (f"evaluation {name}: off-scale mass is 0.9" in caplog.text) == warned
