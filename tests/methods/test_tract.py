"""TRACT's second stage: what it takes over of the first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from real_fast.config import Config, DataConfig, PromptConfig
from real_fast.errors import OutputError
from real_fast.methods.tract import Tract, record
from real_fast.runs.folder import RunFolder
from real_fast.runs.lock import alone_in
from real_fast.types import JudgeRow


def second_stage(output: Path, template: str) -> Config:
    """The settings of stage 2 of a run whose first stage is done."""
    (output / "self_generated.jsonl").write_text("{}", encoding="utf-8")
    prompt, data = PromptConfig(template=template), DataConfig(train="x.jsonl")
    config = Config(method="tract", model="m", output=str(output), resume=True, prompt=prompt, data=data)
    stage: Any = next(Tract.stages(config))
    assert isinstance(stage, Config)
    return stage


def test_the_second_stage_has_the_template_of_the_first_whatever_became_of_its_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine.jinja"
    mine.write_text("{{ response }}, as edited later", encoding="utf-8")
    judge = tmp_path / "run" / "stage1" / "final"
    judge.mkdir(parents=True)
    (judge / "mine.jinja").write_text("{{ response }}", encoding="utf-8")
    (judge / "real_fast.json").write_text(json.dumps({"prompt": {"template": "mine.jinja"}}), encoding="utf-8")
    assert second_stage(tmp_path / "run", str(mine)).prompt.template == str(judge / "mine.jinja")
    (judge / "real_fast.json").write_text(json.dumps({"prompt": {"template": "short"}}), encoding="utf-8")
    assert second_stage(tmp_path / "run", "short").prompt.template == "short"


def test_feedback_that_the_first_stage_did_not_finish_does_not_stop_the_second(tmp_path: Path) -> None:
    """Its share is said when it is written; data.max_rejected is about people's own records."""
    assert second_stage(tmp_path, "short").data.max_rejected == 1


def test_a_stage_that_lost_its_config_yaml_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert RunFolder(second_stage(tmp_path, "short")).resumed
    (tmp_path / "checkpoints").rmdir()
    assert not RunFolder(second_stage(tmp_path, "short")).resumed  # there is nothing to go on from


def test_the_second_stages_rows_have_ready_made_prompts_and_further_fields() -> None:
    messages = [{"role": "user", "content": "Grade this."}]
    row = JudgeRow(
        "a", "p", "", "", "", "", 2.0, [], [], messages=messages, extra={"category": "x", "orig_feedback": "Old."}
    )
    written = record(row, ["Fine."])
    assert written["messages"] == messages and written["extra"] == row.extra and written["feedbacks"] == ["Fine."]
    assert "orig_feedback" not in written


def test_the_first_stages_folder_is_locked_while_it_trains(tmp_path: Path) -> None:
    """A run or an evaluation with --output RUN/stage1 would write there, too."""
    stages: Any = Tract.stages(
        Config(method="tract", model="m", output=str(tmp_path), data=DataConfig(train="x.jsonl"))
    )
    first = next(stages)
    assert first.output == str(tmp_path / "stage1")
    with pytest.raises(OutputError, match="stage1 is being written by process"), alone_in(first.output):
        pass
    stages.close()  # as when the run ends, whichever way
    with (
        alone_in(first.output),
        pytest.raises(OutputError, match="stage1 is being written by process"),
    ):
        next(Tract.stages(Config(method="tract", model="m", output=str(tmp_path), data=DataConfig(train="x.jsonl"))))
