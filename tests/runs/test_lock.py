from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from real_fast.commands import run
from real_fast.config import Config
from real_fast.data.synthetic import generate
from real_fast.distributed.world import OneProcess
from real_fast.errors import OutputError
from real_fast.runs.folder import RunFolder, move_aside
from real_fast.runs.lock import LOCK, alone_in, move_lock
from real_fast.utils.jsonio import write_jsonl

ROOT = Path(__file__).resolve().parents[2]


class MainRank(OneProcess):
    size = 2


class SecondRank(OneProcess):
    rank, size, is_main = 1, 2, False


def hold(folder, inside="print('held', flush=True); time.sleep(60)", ranks=1):
    """Another process that holds the folder's lock, and does something; as the main one of `ranks`."""
    code = (
        f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from real_fast.distributed.world import OneProcess\n"
        "from real_fast.runs.lock import alone_in\n"
        f"OneProcess.size = {ranks}\n"
        f"with alone_in({str(folder)!r}, OneProcess()):\n    {inside}"
    )
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)
    process.said = process.stdout.readline()
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


def test_a_run_is_moved_aside_where_there_are_no_hard_links(tmp_path, monkeypatch):
    """exFAT, SMB, FUSE. The other ranks' share of the lock goes along."""

    def none(*_, **__):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    folder = tmp_path / "run"
    main = alone_in(folder, MainRank())
    with ExitStack() as ranks:
        ranks.enter_context(main)
        ranks.enter_context(alone_in(folder, SecondRank()))
        move_aside(folder)
        assert [p.name for p in folder.iterdir()] == [LOCK] and not list((tmp_path / "run.old-1").iterdir())
        with pytest.raises(OutputError, match=f"by process {os.getpid()} on "), alone_in(folder):
            pass
        main.__exit__(None, None, None)  # the main one is done, and the other holds on
        with pytest.raises(OutputError), alone_in(folder):
            pass


def test_a_lock_that_another_run_has_in_the_new_folder_stays(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / LOCK).write_text("{}", encoding="utf-8")
    with pytest.raises(OutputError, match="is being written by another process"):
        move_lock(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "old" / LOCK).is_file()


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
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with alone_in(tmp_path):
        assert "has no file locks" in caplog.text


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(OutputError, match="cannot be written"), alone_in(tmp_path / "file" / "run"):
        pass


def test_a_worker_that_a_killed_run_leaves_behind_does_not_hold_its_lock(tmp_path):
    """Forked, as vLLM's are: a lock goes on in every copy of its file."""
    process = hold(tmp_path, "os.fork() or print(os.getpid(), flush=True); time.sleep(60)")
    child = int(process.said)
    try:
        with pytest.raises(OutputError, match=f"process {process.pid} on "), alone_in(tmp_path):
            pass
        process.kill()
        process.wait()
        os.kill(child, 0)  # raises if it has ended
        with alone_in(tmp_path):
            pass
    finally:
        process.kill()
        os.kill(child, signal.SIGKILL)


def test_a_forked_process_that_ends_takes_no_lock_away(tmp_path):
    inside = "child = os.fork(); child or sys.exit(0); os.waitpid(child, 0); print('held', flush=True); time.sleep(60)"
    process = hold(tmp_path, inside)
    try:
        assert process.said == "held\n" and (tmp_path / LOCK).is_file()
        with pytest.raises(OutputError, match=f"process {process.pid} on "), alone_in(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_rank_that_outlives_the_main_one_keeps_the_folder(tmp_path):
    main = hold(tmp_path, ranks=2)
    try:
        with alone_in(tmp_path, SecondRank()):
            with pytest.raises(OutputError, match=f"by process {main.pid} on .*, since 20"), alone_in(tmp_path):
                pass
            main.kill()
            main.wait()
            with pytest.raises(OutputError, match=f"what process {main.pid} on .* has left behind"), alone_in(tmp_path):
                pass
        with alone_in(tmp_path):
            pass
    finally:
        main.kill()
        main.wait()
    assert not (tmp_path / LOCK).exists()


def test_a_main_rank_that_ends_with_an_error_leaves_the_folder_to_one_that_still_writes(tmp_path):
    main = hold(tmp_path, "print('held', flush=True); sys.stdin.readline(); raise RuntimeError", ranks=2)
    with alone_in(tmp_path, SecondRank()):
        _, _ = main.communicate("\n", timeout=60)
        assert main.returncode == 1
        said = f"what process {main.pid} on .* has left behind .*, or by a run in another container: end that"
        with pytest.raises(OutputError, match=said), alone_in(tmp_path):
            pass
    assert not (tmp_path / LOCK).exists()  # the last one removes it
    with alone_in(tmp_path):
        pass


@pytest.mark.parametrize("left", [b"", b'{"pid": 1', b"[]", b'{"pid": "me"}', b'{"pid": -1}', b"\xff\xfe", b"\0\0"])
def test_a_lock_file_that_says_nothing_is_taken_over_or_named(tmp_path, left, caplog):
    (tmp_path / LOCK).write_bytes(left)
    with alone_in(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text(encoding="utf-8"))["pid"] == os.getpid()
        (tmp_path / LOCK).write_bytes(left)
        with pytest.raises(OutputError, match="is being written by another process: wait"), alone_in(tmp_path):
            pass
    assert not caplog.text


def test_without_locks_the_process_that_the_file_names_is_looked_for(tmp_path, monkeypatch, caplog):
    """It runs; it has ended; its number is another process's by now."""
    process = hold(tmp_path)
    said = json.loads((tmp_path / LOCK).read_text(encoding="utf-8"))

    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    try:
        with pytest.raises(OutputError, match=f"process {process.pid} on .*, since 20.*stop it"), alone_in(tmp_path):
            pass
        other = json.dumps({**said, "started": said["started"] + 1})
        (tmp_path / LOCK).write_text(other, encoding="utf-8")
        with alone_in(tmp_path):
            assert "has no file locks" in caplog.text
        (tmp_path / LOCK).write_text(json.dumps(said), encoding="utf-8")
    finally:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    with alone_in(tmp_path):  # it has ended, and nobody has asked how
        pass
    process.wait()
    (tmp_path / LOCK).write_text(json.dumps(said), encoding="utf-8")
    with alone_in(tmp_path):
        pass


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_commands_that_write_there_are_refused_meanwhile(tiny_judge, tmp_path, command, capsys):
    write_jsonl(tmp_path / "rows.jsonl", generate(2, 1, seed=0))
    process = hold(tmp_path / "run")
    judged = tmp_path / "judged"
    judged.mkdir()
    (judged / "summary.json").write_text('{"data": "rows.jsonl", "pearson": 0.5}', encoding="utf-8")
    write_jsonl(judged / "predictions.jsonl", [{"id": "a", "prompt_id": "a", "label": 1, "prediction": 1.5}])
    arguments = {
        "evaluate": ["--model", str(tiny_judge), "--data", str(tmp_path / "rows.jsonl")],
        "compare": [str(judged)],
    }[command]
    try:
        assert run(command, [*arguments, "--output", str(tmp_path / "run")]) == 2
    finally:
        process.kill()
        process.wait()
    assert f"is being written by process {process.pid} on " in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
