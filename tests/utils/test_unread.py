"""A command whose output is piped into ``head`` ends without a word when head has seen enough."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from real_fast.errors import run_command

ROOT = Path(__file__).resolve().parents[2]
PRINTS = "from real_fast.errors import run_command; import sys; "


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "real_fast", "train", "--print_config"],
        ["-m", "real_fast", "evaluate", "--help", "all"],
        ["-m", "real_fast", "--version"],
        ["-c", PRINTS + "sys.exit(run_command('x', lambda: print('a table') or 0, ''))"],
        ["-c", PRINTS + "sys.exit(run_command('x', lambda: print('x' * 100_000) or 0, ''))"],
    ],
    ids=["print_config", "help", "version", "less than a buffer", "more than a buffer"],
)
def test_a_closed_pipe_ends_a_command_quietly(arguments):
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_another_pipe_that_broke_is_an_error(capsys):
    def fails():
        raise BrokenPipeError("the tracker is gone")

    assert run_command("x", fails, "") == 2
    assert capsys.readouterr().err == "x: error: the tracker is gone\n"
