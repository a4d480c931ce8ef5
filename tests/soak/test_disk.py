"""The disk that fails on demand, a few of the soak's trials with it, and that the trials find what is lost."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from real_fast.config import Config
from real_fast.errors import DataError, OutputError, remedy, run_command
from real_fast.methods import tract
from real_fast.model.write import _refused
from real_fast.runs import checkpoint, logged
from real_fast.runs.folder import RunFolder, check_writable
from real_fast.runs.sealed import _replace
from real_fast.runs.trackers import Trackers, _known
from real_fast.utils.jsonio import append_jsonl, write_json
from tests.soak import disk
from tests.soak.disk_trials import CASES, Sweep, of_writes, plan
from tests.soak.faulty_disk import FAULTS, missing, preloaded
from tests.soak.tiny_runs import Ended, difference


@pytest.fixture(autouse=True)
def _heard(caplog, monkeypatch):
    """What is logged reaches caplog, whatever a command in an earlier test has set."""
    monkeypatch.setattr(logging.getLogger("real_fast"), "propagate", True)
    caplog.set_level(logging.INFO, logger="real_fast")


ROOT = Path(__file__).resolve().parents[2]
needs_disk = pytest.mark.skipif(missing() is not None, reason=str(missing()))

# Without PyTorch, which takes seconds to import.
IN_THE_CHILD = """
import json, os, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tests.soak.faulty_disk import FAULTS, Disk

folder = Path(sys.argv[1])
disk, found = Disk(folder), {}

def attempt(name, act, number=-1, fault=None):
    error = None
    with disk.watched(number, FAULTS[fault] if fault else None):
        try:
            act()
        except Exception as e:
            error = str(e)
    ops = [name for name, path in disk.journal if path.is_relative_to(disk.folder)]
    found[name] = {"ops": ops, "fired": disk.fired, "error": error}

def text():
    with open(folder / "a.txt", "wb", buffering=0) as file:
        return file.write(b"0123456789")

def several():
    os.mkdir(folder / "d")
    os.rename(folder / "d", folder / "e")
    os.rmdir(folder / "e")
    os.link(folder / "a.txt", folder / "b.txt")
    handle = os.open(folder / "b.txt", os.O_RDWR)
    os.ftruncate(handle, 3), os.pwrite(handle, b"x", 1), os.writev(handle, [b"y", b"z"]), os.fsync(handle)
    os.posix_fallocate(handle, 0, 10), os.close(handle), os.unlink(folder / "b.txt")

attempt("python", text)
attempt("several", several)
attempt("safetensors", lambda: save_file({"x": np.zeros(9)}, folder / "t.safetensors"))
attempt("tokenizers", lambda: Tokenizer(BPE()).save(str(folder / "t.json")))
attempt("reading", lambda: (folder / "a.txt").read_bytes())
attempt("elsewhere", lambda: Path(os.devnull).write_bytes(b"x"), 0, "full")
attempt("full", text, 1, "full")
attempt("short", text, 0, "short")
found["short"]["left"] = (folder / "a.txt").read_text()
attempt("readonly", several, 0, "readonly")
attempt("safetensors full", lambda: save_file({"x": np.zeros(9)}, folder / "t.safetensors"), 2, "full")
attempt("tokenizers full", lambda: Tokenizer(BPE()).save(str(folder / "t.json")), 1, "full")
print(json.dumps(found))
"""


@needs_disk
def test_what_python_and_rust_write_is_noted_and_fails_on_demand(tmp_path):
    folder = tmp_path / "watched"
    folder.mkdir()
    command = [sys.executable, "-c", IN_THE_CHILD, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=preloaded(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["python"] == {"ops": ["create", "write"], "fired": 0, "error": None}
    assert found["several"]["ops"] == [
        "mkdir", "rename", "unlink", "link", "open", "truncate", "write", "write", "fsync", "allocate", "unlink",
    ]  # fmt: skip
    for library in ("safetensors", "tokenizers"):  # not through memory, where a full disk would be a SIGBUS
        assert {"create", "write"} <= set(found[library]["ops"]) and "mmap" not in found[library]["ops"]
        assert found[f"{library} full"]["fired"] and "os error 28" in found[f"{library} full"]["error"]
    assert found["reading"]["ops"] == [] and found["elsewhere"]["fired"] == 0
    assert "No space left" in found["full"]["error"] and found["short"]["left"] == "01234"
    assert "Read-only" in found["readonly"]["error"]


@needs_disk
@pytest.mark.e2e
def test_some_of_the_trials(tmp_path):
    outcomes = disk.tried(tmp_path, {"real": 0.006, "judge": 0.3, "newest checkpoint of real": 0.034})
    assert not [problem for _, problem in outcomes if problem]
    assert len(outcomes) >= 6


def test_every_operation_has_its_turn():
    journal = [(name, Path(f"/run/{n}")) for n, name in enumerate(["create", "write", "fsync", "unlink"] * 9)]
    assert {number for number, _ in plan(journal, 1.0)} == set(range(len(journal)))
    tried = {(journal[number][0], way) for number, way in plan(journal, 1.0)}
    assert tried == {
        (op, way) for op in ("create", "write", "fsync", "unlink") for way in FAULTS if op in FAULTS[way].ops
    }
    assert len(plan(journal, 0.25)) == 9 and len(plan(journal, 2.0)) == 72 == len(set(plan(journal, 2.0)))
    writes = [n for n, (name, _) in enumerate(journal) if name == "write"]
    assert of_writes(journal, 1.0) == [(n, way) for n in writes for way in ("full", "readonly")]
    planned = {case for shares in disk.SHARES for case in shares}
    assert planned >= set(CASES) and {"newest checkpoint of real", "writes of real"} <= planned
    assert sum(map(len, disk.SHARES)) == len(planned)


def test_a_trial_finds_what_is_wrong(tmp_path):
    sweep = Sweep.__new__(Sweep)
    sweep.case, sweep.output = "real", tmp_path
    said = {
        f"real-fast train: error: {tmp_path}/metrics.jsonl: No space left on device: free space there": None,
        "real-fast train: error: [Errno 28] No space left on device": "says no place",
        f"real-fast train: error: {tmp_path} cannot be written: Disk quota exceeded": "or not what to do",
        "Traceback (most recent call last):\nException: Read-only file system (os error 30)": "a traceback",
        f"real-fast train: error: {tmp_path}: free space\nreal-fast train: error: and more": "2 lines of errors",
        f"error: {tmp_path}: free space\nreal-fast train: error: and more": "says no place",
    }
    for text, problem in said.items():
        found = sweep._said(Ended(2, text))
        assert found is None if problem is None else problem in found
    assert "status None" in sweep._said(Ended(None, "")) and "says no place" in sweep._said(Ended(0, "fine"))
    assert difference({"a": 1}, {"a": 2}) and difference({"a": 1}, {}) and difference({}, {"a": 1})
    assert difference({"a": 1}, {"a": 1, "./step-000000/config.json": 0}) is None


def test_an_error_of_the_disk_names_the_file_and_the_remedy(tmp_path, monkeypatch, capsys):
    def full():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
            append_jsonl(tmp_path / "metrics.jsonl", {})
        return 0

    assert run_command("real-fast train", full, "") == 2
    want = f"real-fast train: error: {tmp_path}/metrics.jsonl: No space left: free space there\n"
    assert capsys.readouterr().err == want
    assert remedy(OSError(errno.EXDEV, "Invalid cross-device link")) == "Invalid cross-device link"
    with pytest.raises(OSError, match="Read-only file system") as raised, _refused(tmp_path):
        raise Exception("Read-only file system (os error 30)")
    assert raised.value.errno == errno.EROFS and raised.value.filename == str(tmp_path)
    with pytest.raises(ValueError, match="os error 30"), _refused(tmp_path):
        raise ValueError("(os error 30)")


def refusing(monkeypatch, *names):
    def refuse(*args, **_):
        raise OSError(errno.EROFS, "Read-only file system", str(args[0]))

    for name in names:
        monkeypatch.setattr(os, name, refuse)


def test_a_disk_that_takes_nothing_back_is_not_the_first_error(tmp_path, monkeypatch):
    refusing(monkeypatch, "unlink", "replace")
    with pytest.raises(OSError, match=r"summary\.json"):
        write_json(tmp_path / "summary.json", {})
    # A probe that was made and stays is the first error; one on a disk that is full or read-only is not.
    with pytest.raises(OutputError, match=r"\.probe\..* cannot be removed again: Read-only file system: \w"):
        check_writable(tmp_path)


def test_half_of_a_removed_checkpoint_has_no_checkpoints_name(tmp_path, monkeypatch, caplog):
    old = tmp_path / "step-000001"
    old.mkdir()
    (old / "trainer_state.json").write_text("{}")

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    checkpoint._remove(old)
    assert not checkpoint.complete(tmp_path) and "step-000001.old.tmp could not be removed" in caplog.text


def test_what_was_to_be_replaced_is_back_where_the_new_one_gets_no_name(tmp_path, monkeypatch):
    for name in ("final", "final.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    replace = os.replace

    def refuse(old, new):
        if old.name == "final.tmp":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(old, new)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        _replace(tmp_path / "final.tmp", tmp_path / "final")
    assert (tmp_path / "final" / "x").read_text() == "final"


def test_a_log_that_changed_behind_a_checkpoint_is_named(tmp_path, caplog):
    run, step = tmp_path, tmp_path / "checkpoints" / "step-000001"
    step.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "rollouts.jsonl").write_text('{"step": 1}\n')
    (step / logged.FILE).write_text(logged.text_of(run))
    append_jsonl(run / "metrics.jsonl", {"step": 2})  # what came later stands behind it
    logged.check(run, step)
    assert not caplog.records
    for text in ('{"step": 3}\n{"step": 2}\n', '{"ste', ""):
        (run / "metrics.jsonl").write_text(text)
        caplog.clear()
        logged.check(run, step)
        assert "metrics.jsonl: not as it was when step-000001" in caplog.text and "rollouts" not in caplog.text
    (run / "rollouts.jsonl").unlink()
    logged.check(run, step)
    assert "rollouts.jsonl: not as it was" in caplog.text


def test_rows_that_changed_behind_stage_1_are_refused(tmp_path):
    generated, handover = tmp_path / "self_generated.jsonl", tmp_path / tract._HANDOVER
    generated.write_text('{"score": 1}\n')
    tract._check_handover(tmp_path, generated)  # of an earlier version, which kept no checksums
    handover.write_text(logged.text_of(tmp_path, [generated.name]))
    tract._check_handover(tmp_path, generated)
    generated.write_text('{"score": 2}\n')
    with pytest.raises(DataError, match=r"self_generated\.jsonl: not as stage 1 wrote it.* --resume"):
        tract._check_handover(tmp_path, generated)
    handover.write_text("[")
    with pytest.raises(DataError, match=r"handover\.json is damaged"):
        tract._check_handover(tmp_path, generated)


def test_a_folder_in_a_files_place_is_found_before_the_work(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "eval" / "before.json").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"before\.json is a folder, where the run has a file: move it away"):
        RunFolder(Config(output=str(tmp_path), resume=True))


def test_a_trackers_state_with_another_digit_is_not_believed(tmp_path, caplog):
    trackers = Trackers(
        Config(output=str(tmp_path / "run"), report_to=[]), RunFolder(Config(output=str(tmp_path / "run"))), None
    )
    trackers._active["mine"] = type("Mine", (), {"log": lambda *_: None})()
    trackers.log({"phase": "real", "step": 3, "reward": 1.0})
    file = tmp_path / "run" / "trackers.json"
    assert _known(file)["sent"] == {"mine": {"train": 3}}
    file.write_text(file.read_text().replace('"train": 3', '"train": 2'))
    with caplog.at_level(logging.WARNING):
        assert _known(file) == {} and "is damaged" in caplog.text


def test_a_folder_that_cannot_be_written_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system"))
    )
    with pytest.raises(OutputError, match="cannot be written: Read-only file system: make that disk writable"):
        check_writable(tmp_path)
