"""The runs' processes: order, failures, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from experiments import launch, run
from experiments.settings import Experiment, Primary, run_folder
from experiments.sources import Data
from tests.experiments.tiny import TINY


def experiment_of(methods: dict[str, dict[str, Any]], seeds: list[int]) -> Experiment:
    """An experiment without rows."""
    return Experiment(seeds, Data({}), TINY["common"], methods, Primary([], []))


def test_a_run_that_fails_takes_its_followers_along_alone(tmp_path: Path) -> None:
    tried = []

    def one(method: str, seed: int, _processes: Any) -> tuple[int, Path]:
        tried.append(f"{method}-{seed}")
        return (3 if tried[-1] == "sft-0" else 0), tmp_path / "log"

    experiment = experiment_of(TINY["methods"], [0, 1])
    failed: list[str] = []
    launch.run_all(experiment, experiment.order(), one, failed)
    assert failed == [
        f"sft-0 failed with status 3: see {tmp_path / 'log'}", "real-0 was left out: it starts from sft-0",
    ]  # fmt: skip
    assert tried == ["base-0", "sft-0", "sft-1", "real-1"]


def test_two_do_not_run_in_one_folder(tmp_path: Path) -> None:
    """Neither another command, nor one after the first was killed whose run goes on."""
    with run.alone_in(tmp_path):
        with pytest.raises(OSError, match="is in use"), run.alone_in(tmp_path):
            pass
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    with pytest.raises(OSError, match="is in use"), run.alone_in(tmp_path):
        pass
    child.communicate(b"\n")
    with run.alone_in(tmp_path):
        pass


@pytest.mark.parametrize("jobs", [1, 2, 6])
def test_several_at_a_time_each_behind_its_start(tmp_path: Path, jobs: int) -> None:
    methods = {"sft": {"method": "sft"}, "real": {"init_from": "sft"}, "other": {"method": "sft"}}
    experiment = experiment_of(methods, [0, 1])
    events: list[tuple[int, str]] = []
    full = threading.Event()

    def most_at_once() -> int:
        return max(accumulate(change for change, _ in events))

    def one(method: str, seed: int, _processes: Any) -> tuple[int, Path]:
        events.append((1, f"{method}-{seed}"))
        if most_at_once() == min(jobs, 4):
            full.set()
        full.wait(20)
        time.sleep(0.1)  # for more than there should be
        events.append((-1, f"{method}-{seed}"))
        return 0, tmp_path / "log"

    launch.run_all(experiment, experiment.order(), one, [], jobs)
    assert len(events) == 12
    for seed in (0, 1):
        assert events.index((-1, f"sft-{seed}")) < events.index((1, f"real-{seed}"))
    # Of six runs, four can start at once.
    assert most_at_once() == min(jobs, 4)


# Says that it has started; where Ctrl-C comes, it takes a moment, as a run that finishes its step.
_STAYS = """
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.3); pathlib.Path(sys.argv[1], "checkpoint").touch(); sys.exit(130)
signal.signal(signal.SIGINT, stop)
pathlib.Path(sys.argv[1], "started").touch()
time.sleep(60)
"""


def test_ctrl_c_lets_every_run_write_its_checkpoint(tmp_path: Path) -> None:
    experiment = experiment_of({"sft": {"method": "sft"}}, [0, 1, 2])
    folders = [tmp_path / f"sft-{seed}" for seed in (0, 1)]

    def one(method: str, seed: int, processes: launch.Processes) -> tuple[int, Path]:
        mine = tmp_path / f"{method}-{seed}"
        mine.mkdir()
        with (tmp_path / "log").open("a") as said:
            return processes.run([sys.executable, "-c", _STAYS, str(mine)], said)[0], tmp_path / "log"

    def press() -> None:
        while not all((folder / "started").exists() for folder in folders):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=press, daemon=True).start()
    with run.stopped_by(signal.SIGTERM), pytest.raises(KeyboardInterrupt):
        launch.run_all(experiment, experiment.order(), one, [], jobs=2)
    assert all((folder / "checkpoint").exists() for folder in folders) and not (tmp_path / "sft-2").exists()
    # A run that is about to start when Ctrl-C comes does not.
    stopped = launch.Processes(1)
    stopped.stop([])
    with (tmp_path / "log").open("a") as said:
        assert stopped.run([sys.executable, "-c", "raise SystemExit(7)"], said) == (130, 0.0)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def work(_self: Any, command: list[str], _said: Any) -> tuple[int, float]:
        commands.append(command)
        return len(commands) % 2, 1.0  # the first one fails

    monkeypatch.setattr(launch.Processes, "run", work)
    experiment = experiment_of(TINY["methods"], [0])
    assert launch.train_one(experiment, tmp_path, "sft", 0, launch.Processes(1))[0] == 1
    (run_folder(tmp_path, "sft", 0) / "stage1" / "checkpoints").mkdir(parents=True)
    assert launch.train_one(experiment, tmp_path, "sft", 0, launch.Processes(1))[0] == 0
    assert "--resume" not in commands[0] and commands[1][-2:] == ["--resume", "true"]
    assert not (run_folder(tmp_path, "sft", 0) / "stage1" / "checkpoints").exists()
    (run_folder(tmp_path, "sft", 0) / "summary.json").touch()
    assert launch.train_one(experiment, tmp_path, "sft", 0, launch.Processes(1))[0] == 0 and len(commands) == 2
    # Both sittings count.
    assert len(launch.cpu_file(tmp_path, "sft", 0).read_text().splitlines()) == 2


def test_what_a_process_cost(tmp_path: Path) -> None:
    busy = "import time\nwhile time.process_time() < 0.5: pass\nraise SystemExit(3)"
    with (tmp_path / "log").open("a") as said:
        status, cpu = launch.Processes(1).run([sys.executable, "-c", busy], said)
    assert status == 3 and 0.5 <= cpu < 5
