"""The runs' processes: each behind what it starts from, several at a time, stopped together."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO

import yaml

from experiments.settings import Experiment, run_folder

# Of a run that Ctrl-C stopped.
_STOPPED = 130


def run_all(
    experiment: Experiment, folder: Path, methods: Sequence[str] | None, failed: list[str], jobs: int = 1
) -> None:
    """Make the runs that are not done.

    Args:
        experiment: The experiment.
        folder: Where its runs are.
        methods: These alone, and what they start from; None for all.
        failed: Gets a sentence for every run that failed, and for those that would have started from it.
        jobs: Runs at a time; they share the machine's cores.
    """
    wanted = {m for method in methods or experiment.methods for m in [method, *experiment.starts(method)]}
    waiting = [
        (method, seed)
        for method, seed in experiment.order()
        if method in wanted and not (run_folder(folder, method, seed) / "summary.json").is_file()
    ]
    count = len(waiting)
    lost: set[tuple[str, int]] = set()
    running: dict[Future[tuple[int, Path]], tuple[str, int]] = {}
    processes = Processes(jobs)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or running:
                for method, seed in list(waiting):
                    start = (experiment.methods[method].get("init_from"), seed)
                    if start in lost:
                        waiting.remove((method, seed))
                        lost.add((method, seed))
                        failed.append(f"{method}-{seed} was left out: it starts from {start[0]}-{seed}")
                    elif len(running) < jobs and start not in waiting and start not in running.values():
                        place = count - len(waiting) + 1
                        print(f"[{time.strftime('%H:%M:%S')}] run {place} of {count}: {method}-{seed}", flush=True)
                        waiting.remove((method, seed))
                        running[pool.submit(run_one, experiment, folder, method, seed, processes)] = method, seed
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    method, seed = running.pop(future)
                    status, log = future.result()
                    if status == _STOPPED:
                        raise KeyboardInterrupt
                    if status:
                        lost.add((method, seed))
                        failed.append(f"{method}-{seed} failed with status {status}: see {log}")
                        print(failed[-1], flush=True)
        except BaseException:
            processes.stop([f"{method}-{seed}" for method, seed in running.values()])
            raise


def run_one(experiment: Experiment, folder: Path, method: str, seed: int, processes: Processes) -> tuple[int, Path]:
    """Train one judge in a process of its own, or go on with it. Returns its exit status and its log."""
    name, output = f"{method}-{seed}", run_folder(folder, method, seed)
    config, log = config_file(folder, method, seed), folder / "logs" / f"{name}.log"
    for file in (config, log):
        file.parent.mkdir(exist_ok=True)
    config.write_text(yaml.safe_dump(experiment.config(method, seed, folder), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "real_fast.train", "--config", str(config)]
    if output.is_dir():
        command += ["--resume", "true"]
    with log.open("a", encoding="utf-8") as said:
        status = processes.run(command, said)
    if status == 0:
        for run in (output, output / "stage1"):  # the optimiser's state takes six times the model's room
            for part in ("checkpoints", "reference"):
                shutil.rmtree(run / part, ignore_errors=True)
    return status, log


def config_file(folder: Path, method: str, seed: int) -> Path:
    """The settings that a run is started with."""
    return folder / "configs" / f"{method}-{seed}.yaml"


class Processes:
    """Processes that threads wait for, and that are stopped together.

    Args:
        jobs: How many there are at a time. Several share the cores, unless OMP_NUM_THREADS is set.
    """

    def __init__(self, jobs: int) -> None:
        self._live: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._stopping = False
        self._environment = dict(os.environ)
        if jobs > 1:
            self._environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))

    def run(self, command: list[str], said: IO[str]) -> int:
        """Run a command to its end. Returns its exit status; 130, and nothing is started, once :meth:`stop` was called.

        Args:
            command: The command.
            said: Where its output goes.
        """
        with self._lock:
            if self._stopping:
                return _STOPPED
            # In a session of its own, or Ctrl-C would reach it twice, which stops it without a checkpoint.
            process = subprocess.Popen(
                command, stdout=said, stderr=said, start_new_session=True, close_fds=False, env=self._environment
            )
            self._live.append(process)
        status = process.wait()
        with self._lock:
            self._live.remove(process)
        return status

    def stop(self, names: list[str]) -> None:
        """Ask them to stop after their step, and wait; Ctrl-C meanwhile ends them at once."""
        with self._lock:
            self._stopping = True
            live = list(self._live)
        if not live:
            return
        print(f"stopping {', '.join(names)} after the step (again: at once)", file=sys.stderr)
        for process in live:
            process.send_signal(signal.SIGINT)
        try:
            for process in live:
                process.wait()
        except KeyboardInterrupt:
            for process in live:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
