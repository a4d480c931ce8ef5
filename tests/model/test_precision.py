"""train.precision: auto is what the machine multiplies fast in, and says so."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
import yaml

from real_fast.config import Config, TrainConfig
from real_fast.judging.judge import Judge
from real_fast.model import precision
from real_fast.training.setup import settled

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def asked_anew():
    precision._auto.cache_clear()
    yield
    precision._auto.cache_clear()


@pytest.mark.parametrize(("fast", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_what_is_fast_on_this_cpu_and_says_why_once(monkeypatch, caplog, fast, expected):
    monkeypatch.setattr(precision, "has_fast_bf16", lambda: (fast, "as measured"))
    with caplog.at_level(logging.INFO, logger="real_fast"):
        assert [precision.resolve("auto", CPU) for _ in range(2)] == [expected, expected]
    assert [record.getMessage() for record in caplog.records] == [f"precision {expected}: as measured"]


def test_a_precision_that_is_given_is_taken(monkeypatch):
    monkeypatch.setattr(precision, "has_fast_bf16", lambda: pytest.fail("nothing is to be measured"))
    assert precision.resolve("bf16", CPU) == "bf16"
    assert precision.resolve("fp32", CPU) == "fp32"


def test_a_resumed_run_stays_at_its_precision(monkeypatch, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"train": {"precision": "bf16"}}))
    monkeypatch.setattr(precision, "has_fast_bf16", lambda: (False, "another machine"))
    config = Config(output=str(tmp_path))
    assert config.train.precision == "auto"
    assert settled(config).train.precision == "fp32"
    assert settled(replace(config, resume=True)).train.precision == "bf16"
    assert settled(replace(config, resume=True, train=TrainConfig(precision="fp32"))).train.precision == "fp32"


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_judge_computes_in_what_is_fast(monkeypatch, tiny_judge, fast, dtype):
    monkeypatch.setattr(precision, "has_fast_bf16", lambda: (fast, "as measured"))
    judge = Judge(tiny_judge, engine="transformers")
    assert judge._engine.dtype == dtype
