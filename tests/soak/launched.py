"""Runs from the command line that are killed: python -m real_fast.train, and torchrun itself with its ranks."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import ROOT
from tests.soak.same_run import differences

_LONGEST = 180.0  # seconds of one run, of which imports take the most


def killed_and_resumed(
    argv: Sequence[str], output: Path, undisturbed: Path, size: int, all_ranks: bool, seed: int
) -> str | None:
    """What was lost, None for nothing.

    Args:
        argv: The run's flags.
        output: Its folder, new.
        undisturbed: The folder of the same run that nobody killed.
        size: Processes; above one, torchrun starts them.
        all_ranks: Kill torchrun and all ranks; without, one rank, and torchrun ends the others.
        seed: Of the moment.
    """
    rng = random.Random(seed)
    lines, more = rng.randint(1, 9), rng.random() / 2
    log = output.with_name(f"{output.name}.log")
    process = _start(argv, size, log)
    try:
        end = time.monotonic() + _LONGEST
        while _lines(output) < lines and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(more)
        ranks = _children(process.pid) if size > 1 else []
        for victim in [process.pid, *ranks] if all_ranks or size == 1 else [rng.choice(ranks)]:
            os.kill(victim, signal.SIGKILL)
        status = process.wait(60)
        if status == 0:
            return f"{size} processes, seed {seed}: the launcher said that all was well"
        _wait_for(ranks)
    finally:
        process.kill()
        process.wait()
    resumed = _start([*argv, "--resume"], size, log)
    try:
        status = resumed.wait(_LONGEST)
    finally:
        resumed.kill()
        resumed.wait()
    if status:
        said = log.read_text(encoding="utf-8", errors="replace")[-1500:]
        return f"{size} processes, seed {seed}: --resume ended with {status}: {said}"
    lost = differences(undisturbed, output)
    return f"{size} processes, killed at line {lines}, seed {seed}: {'; '.join(lost)}" if lost else None


def _start(argv: Sequence[str], size: int, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "real_fast.train"]
    if size > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "real_fast.train"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with log.open("ab") as file:
        return subprocess.Popen([*command, *argv], stdout=file, stderr=file, env=environment, cwd=ROOT)


def _lines(output: Path) -> int:
    file = output / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(child) for child in file.read().split()]


def _wait_for(pids: Sequence[int]) -> None:
    """Until they have ended: torchrun's ranks are nobody's children once it is killed."""
    end = time.monotonic() + 30
    while any(map(_alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
