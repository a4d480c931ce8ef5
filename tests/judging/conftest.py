"""A judge's folder, and judges on an engine that is made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from real_fast import Judge
from tests.judging.fakes import FakeEngine


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], small_tokenizer: Any) -> Path:
    """A random model as real_fast.train leaves one: scale and prompt of its own beside it."""
    path = tmp_path_factory.mktemp("judge")
    tiny_llama(tied=True, vocab_size=len(small_tokenizer), hidden_size=16).save_pretrained(path)
    small_tokenizer.save_pretrained(path)
    settings = {
        "scale": {"values": [1, 2, 3], "phrase": "Grade: "},
        "prompt": {"template": "short", "system": "Grade.", "max_tokens": 120},
        "rollout": {"answer": "forced", "max_tokens": 6, "top_p": 1.0},
        "objective": {"renormalize": True},
    }
    (path / "real_fast.json").write_text(json.dumps(settings))
    return path


@pytest.fixture
def with_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Judge]:
    def make(engine: FakeEngine, **settings: Any) -> Judge:
        monkeypatch.setattr("real_fast.judging.judge.load_engine", lambda *_: engine)
        return Judge(folder, **settings)

    return make
