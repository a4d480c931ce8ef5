"""The runs' processes: each behind what it starts from, several at a time, stopped together."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any

import yaml

from experiments import record
from experiments.record import cpu_file, file_of
from experiments.settings import Experiment, run_folder
from real_fast.utils.jsonio import append_jsonl

# Makes the run of a method and a seed; returns its exit status and its log.
One = Callable[[str, int, "Processes"], tuple[int, Path]]
# Of a run that Ctrl-C stopped.
_STOPPED = 130


def run_all(experiment: Experiment, waiting: list[tuple[str, int]], one: One, failed: list[str], jobs: int = 1) -> None:
    """Make runs, each behind the one that it starts from.

    Args:
        experiment: Says what starts from what.
        waiting: The runs (method, seed), in their order.
        one: Makes one of them; returns its exit status and its log.
        failed: Gets a sentence for every run that failed, and for those that would have started from it.
        jobs: Runs at a time; they share the machine's cores.
    """
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
                        running[pool.submit(one, method, seed, processes)] = method, seed
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


def needed(experiment: Experiment, folder: Path, results: Path, methods: Sequence[str] | None) -> list[tuple[str, int]]:
    """Runs (method, seed) to make, in their order: those that left no file, and the starts whose weights are not here.

    A start that another machine made has left its file and no weights: it is trained once more, with the same settings
    and rows, and its file stays as it is. Sums in another order make other weights of it, so the files of the runs tell
    the weights that they started from.
    """
    wanted = {m for method in methods or experiment.methods for m in [method, *experiment.starts(method)]}
    recorded = {run for run in experiment.order() if file_of(results, *run).is_file()}
    todo = {run for run in experiment.order() if run[0] in wanted and run not in recorded}
    again = set()
    for method, seed in sorted(todo):
        for start in experiment.starts(method):
            if (run_folder(folder, start, seed) / "summary.json").is_file():
                break
            if (start, seed) in recorded:
                again.add((start, seed))
    for method, seed in sorted(again):
        print(f"{method}-{seed} is trained again: its weights are not here, and other runs start from them", flush=True)
    return [run for run in experiment.order() if run in todo | again]


def run_one(
    experiment: Experiment, folder: Path, results: Path, method: str, seed: int, processes: Processes
) -> tuple[int, Path]:
    """Train one judge, grade with it and write its file, each in a process of its own, or go on with what is left.

    Returns:
        The exit status of the process that failed, or 0, and the log.
    """
    output, spent = run_folder(folder, method, seed), cpu_file(folder, method, seed)
    status, log = train_one(experiment, folder, method, seed, processes)
    if status or file_of(results, method, seed).is_file():
        return status, log
    for part, settings in gradings(experiment, folder, method, seed).items():
        if not (output / part / "summary.json").is_file():
            file = written(folder, f"{method}-{seed}-{part}", settings)
            command = [sys.executable, "-m", "real_fast.evaluate", "--config", str(file)]
            if status := timed(part, command, log, spent, processes):
                return status, log
    record.write(experiment, folder, results, method, seed)
    return 0, log


def train_one(experiment: Experiment, folder: Path, method: str, seed: int, processes: Processes) -> tuple[int, Path]:
    """Train one judge in a process of its own, or go on with it. Returns its exit status and its log."""
    name, output = f"{method}-{seed}", run_folder(folder, method, seed)
    log = folder / "logs" / f"{name}.log"
    if (output / "summary.json").is_file():
        return 0, log
    config = written(folder, name, experiment.config(method, seed, folder))
    command = [sys.executable, "-m", "real_fast.train", "--config", str(config)]
    if output.is_dir():
        command += ["--resume", "true"]
    status = timed("train", command, log, cpu_file(folder, method, seed), processes)
    if status == 0:
        for run in (output, output / "stage1"):  # the optimiser's state takes six times the model's room
            for part in ("checkpoints", "reference"):
                shutil.rmtree(run / part, ignore_errors=True)
        shutil.rmtree(output / "stage1" / "final", ignore_errors=True)
    return status, log


def written(folder: Path, name: str, settings: dict[str, Any]) -> Path:
    """Write the settings of a process; returns the file."""
    file = folder / "configs" / f"{name}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return file


def gradings(experiment: Experiment, folder: Path, method: str, seed: int) -> dict[str, dict[str, Any]]:
    """Settings of the evaluations of a trained run, by the name of their folder in the run's."""
    run, rows = run_folder(folder, method, seed), folder / "data"
    rollout = experiment.common.get("rollout", {})
    common = {
        "model": str(run / "final"),
        "seed": seed,
        "bootstrap": 1,  # intervals come later, from all runs together
        "precision": experiment.common.get("train", {}).get("precision", "auto"),
        "rollout": {key: rollout[key] for key in ("engine", "max_num_seqs") if key in rollout},
    }

    def one(part: str, kind: str, names: Iterable[str], **more: Any) -> dict[str, Any]:
        files = {name: str(rows / f"{kind}-{name}.jsonl") for name in names}
        return common | {"data": files, "output": str(run / part)} | more

    averaged = {
        f"averaged-{n}": one(f"averaged-{n}", "averaged", experiment.primary.benchmarks, n=n, temperature=1.0)
        for n in experiment.feedbacks(method, seed)
    }
    return {"test": one("test", "test", experiment.graded_on(method), temperature=0.0)} | averaged


def timed(part: str, command: list[str], log: Path, spent: Path, processes: Processes) -> int:
    """Run a command, and write down what it cost. Returns its exit status."""
    started = time.perf_counter()
    log.parent.mkdir(exist_ok=True)
    with log.open("a", encoding="utf-8") as said:
        status, cpu = processes.run(command, said)
    append_jsonl(spent, {"part": part, "cpu": cpu, "wall": time.perf_counter() - started})
    return status


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

    def run(self, command: list[str], said: IO[str]) -> tuple[int, float]:
        """Run a command to its end.

        Args:
            command: The command.
            said: Where its output goes.

        Returns:
            Its exit status, and the CPU-seconds that it and its own processes took. 130, and nothing is started, once
            :meth:`stop` was called.
        """
        with self._lock:
            if self._stopping:
                return _STOPPED, 0.0
            # In a session of its own, or Ctrl-C would reach it twice, which stops it without a checkpoint.
            process = subprocess.Popen(
                command, stdout=said, stderr=said, start_new_session=True, close_fds=False, env=self._environment
            )
            self._live.append(process)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:  # so that stop signals none whose number may be another's by now
            _, ended, usage = os.wait4(process.pid, 0)
            self._live.remove(process)
        process.returncode = os.waitstatus_to_exitcode(ended)
        return process.returncode, usage.ru_utime + usage.ru_stime

    def stop(self, names: list[str]) -> None:
        """Ask them to stop after their step, and wait; Ctrl-C meanwhile ends them at once."""
        with self._lock:
            self._stopping = True
            if not self._live:
                return
            print(f"stopping {', '.join(names)} after the step (again: at once)", file=sys.stderr)
            for process in self._live:
                os.kill(process.pid, signal.SIGINT)
        try:
            while self._live:
                time.sleep(0.1)
        except KeyboardInterrupt:
            with self._lock:
                for process in self._live:
                    os.killpg(process.pid, signal.SIGKILL)
