"""What a checkpoint knows of the logs: files that cannot be read, a list that is damaged."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace

from real_fast.distributed.world import ALONE
from real_fast.errors import EngineError
from real_fast.runs import logged
from real_fast.runs.checkpoint import TrainState
from real_fast.training.saving import Saver


def test_a_log_that_cannot_be_read_is_said_and_left_out(tmp_path, monkeypatch, caplog):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "rollouts.jsonl").write_text("{}\n")
    opened = Path.open

    def refuse(path, *args, **kwargs):
        if path.name == "metrics.jsonl":
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    assert json.loads(logged.text_of(tmp_path)).keys() == {"rollouts.jsonl"}
    assert "metrics.jsonl cannot be read" in caplog.text
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "before.json").symlink_to("nowhere")
    assert json.loads(logged.text_of(tmp_path)).keys() == {"rollouts.jsonl"}


def test_a_damaged_list_of_logs_is_a_warning(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / logged.FILE).write_text('{"metrics.jsonl": null}')  # as an earlier version wrote it
    logged.check(tmp_path, tmp_path)
    assert not caplog.records
    for text in (b"[]", b'{"metrics.jsonl": 7}', b'{"metrics.jsonl": {"bytes": "x"}}', b"[" * 10**5, b"\xff", b""):
        (tmp_path / logged.FILE).write_bytes(text)
        caplog.clear()
        logged.check(tmp_path, tmp_path)
        assert f"{tmp_path / logged.FILE} cannot be read" in caplog.text


def test_an_engines_error_is_not_hidden_by_a_disk_that_fails_then(monkeypatch, caplog):
    saver = object.__new__(Saver)
    saver.newest, saver.updater = 1, SimpleNamespace(world=ALONE)

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error", "metrics.jsonl")

    monkeypatch.setattr(Saver, "checkpoint", fails)
    saver.keep(EngineError("the engine failed"), TrainState(step=2), dict)
    assert "Input/output error" in caplog.text
