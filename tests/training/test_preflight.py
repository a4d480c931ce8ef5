"""What is said before the work starts. What is refused there has its tests beside what it is about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from real_fast.config import Config, PromptConfig, ScaleConfig
from real_fast.training.preflight import warn_if_asked_otherwise

MINE = "Grade {{ response }}."


def test_a_judge_that_was_asked_in_another_way_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said(scale: Any = None, **prompt: Any) -> str:
        caplog.clear()
        prompt = {"template": str(tmp_path / "mine.jinja"), "system": "", **prompt}
        config = Config(
            model=str(tmp_path), scale=scale or ScaleConfig(phrase="[RESULT] "), prompt=PromptConfig(**prompt)
        )
        warn_if_asked_otherwise(config, template=MINE)
        return caplog.text

    assert not said()  # a model that is no judge
    (tmp_path / "judge_template.jinja").write_text(MINE)
    prompt = {"template": "judge_template.jinja", "system": "", "max_tokens": 64, "chat_template_kwargs": {}}
    scale = {"values": [1, 2, 3, 4, 5], "phrase": "[RESULT] ", "labels": []}
    (tmp_path / "real_fast.json").write_text(json.dumps({"scale": scale, "prompt": prompt}))
    assert not said()
    assert "scale.phrase was '[RESULT] ' and is 'So the overall score is '" in said(ScaleConfig())
    assert "scale.values was [1, 2, 3, 4, 5] and is [0, 1]" in said(ScaleConfig([0, 1], "[RESULT] "))
    assert "prompt.system was '' and is 'Grade.'" in said(system="Grade.")
    (tmp_path / "judge_template.jinja").write_text("Another.")
    assert "prompt.template was" in said()
