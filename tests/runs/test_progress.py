"""Progress moves while one long operation goes on, and messages do not cut through it."""

from __future__ import annotations

import logging
import time

from transformers.utils import logging as transformers_logging

from real_fast.runs import log, progress


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_a_bar_moves_before_its_first_unit_is_done(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.02)
    seen = ""

    def moved():
        nonlocal seen
        seen += capsys.readouterr().err
        return "sample, token 3" in seen

    with progress.progress_bar("sample", 10, "row") as bar:
        progress.show("token 3")
        assert wait_for(moved)
        bar.update(10)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "token 3" not in last
    assert "10/10" in last


def test_notes_go_to_the_innermost_bar_and_nowhere_without_one():
    progress.show("nobody sees this")
    with progress.progress_bar("outer", 1, "step") as outer:
        with progress.progress_bar("inner", 1, "row") as inner:
            progress.show("here")
            assert (outer.note, inner.note) == ("", "here")
        progress.show("there")
        assert outer.note == "there"


def test_a_message_stands_on_a_line_of_its_own(capsys):
    log.set_up()
    with progress.progress_bar("sample", 10, "row"):
        logging.getLogger("real_fast.test").info("something happened")
    assert "something happened" in capsys.readouterr().err.replace("\r", "\n").splitlines()


def test_foreign_bars_are_off_for_as_long_as_it_says():
    before = transformers_logging.is_progress_bar_enabled()
    with progress.no_foreign_bars():
        assert not transformers_logging.is_progress_bar_enabled()
    assert transformers_logging.is_progress_bar_enabled() == before


def test_what_libraries_warn_of_while_they_are_imported_is_not_said(caplog):
    log.set_up()
    for name in ("torchao", "torchao.quantization", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).warning("Failed to load _C.cpython-310.so")
    assert not caplog.records
