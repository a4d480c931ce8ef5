from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from real_fast.config import Config
from real_fast.errors import OutputError
from real_fast.runs.folder import RunFolder, move_aside
from real_fast.runs.lock import LOCK, alone_in

ROOT = Path(__file__).resolve().parents[2]


def hold(folder):
    """Another process that holds the folder's lock."""
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from real_fast.runs.lock import alone_in\n"
        f"with alone_in({str(folder)!r}):\n    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_holds_the_folder_and_a_killed_one_holds_nothing(tmp_path):
    process = hold(tmp_path)
    try:
        with pytest.raises(OutputError, match=f"written by process {process.pid} on ") as refused, alone_in(tmp_path):
            pass
        assert "another --output" in str(refused.value)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / LOCK).is_file()
    with alone_in(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text(encoding="utf-8"))["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_the_lock_stays_with_the_name_of_a_folder_that_is_moved_aside(tmp_path):
    folder = tmp_path / "run"
    with alone_in(folder):
        (folder / "file").write_text("of an earlier run", encoding="utf-8")
        move_aside(folder)
        assert [p.name for p in folder.iterdir()] == [LOCK]
        assert [p.name for p in (tmp_path / "run.old-1").iterdir()] == ["file"]
        with pytest.raises(OutputError), alone_in(folder):
            pass
    assert not list(folder.iterdir())


def test_a_link_stays_where_a_run_behind_it_is_moved_aside(tmp_path):
    folder, link = tmp_path / "disk" / "run", tmp_path / "run"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    link.symlink_to(folder)
    config = Config(output=str(link), overwrite=True)
    with alone_in(link):
        RunFolder(config).claim(config)
        assert link.is_symlink() and link.resolve() == folder and not (folder / "metrics.jsonl").exists()
        assert (tmp_path / "disk" / "run.old-1" / "metrics.jsonl").is_file()
    assert not (folder / LOCK).exists()


def test_the_working_folder_is_not_moved_aside(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    with pytest.raises(OutputError, match="holds the working folder"):
        RunFolder(Config(output="..", overwrite=True))


def test_an_output_that_is_no_folder_says_what_it_is(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name, said in (("file", "is a file: give"), ("link", "is a link to nowhere, which does not exist")):
        with pytest.raises(OutputError, match=f"{name} {said}"), alone_in(tmp_path / name):
            pass


def test_a_lock_left_by_another_host_is_said(tmp_path, caplog):
    (tmp_path / LOCK).write_text('{"pid": 7, "host": "elsewhere"}', encoding="utf-8")
    with alone_in(tmp_path):
        assert "process 7 on elsewhere" in caplog.text


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    import fcntl

    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with alone_in(tmp_path):
        assert "has no file locks" in caplog.text


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OutputError, match="cannot be written"), alone_in(tmp_path / "file" / "run"):
        pass
