"""torchrun itself: a signal to it ends all ranks at one step with a checkpoint, and one rank's death ends all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from real_fast.runs import checkpoint
from real_fast.utils.jsonio import read_jsonl
from tests.helpers import flags

LONG = ["--train.steps", "100000", "--eval.on_start", "false", "--warmup.steps", "0", "--save.every", "1000"]


def start(arguments, log):
    """torchrun with two ranks; their output goes to a file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", "-m", "real_fast.train", *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment)


def updates(output):
    file = output / "metrics.jsonl"
    return [line["step"] for line in read_jsonl(file) if line["phase"] == "real"] if file.is_file() else []


def wait_for(condition, process, log, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.1)


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.parametrize("how", ["SIGTERM to torchrun", "SIGKILL to a rank"])
def test_ends_together(tiny_judge, tmp_path, how):
    output, log = tmp_path / "run", tmp_path / "log"
    process = start(flags(tiny_judge, output, *LONG), log)
    try:
        wait_for(lambda: len(updates(output)) >= 2, process, log)
        if how.startswith("SIGTERM"):
            process.send_signal(signal.SIGTERM)
        else:
            os.kill(children(process.pid)[1], signal.SIGKILL)
        assert process.wait(60) != 0
    finally:
        process.kill()
    newest = checkpoint.newest(output / "checkpoints")
    assert newest is not None
    if how.startswith("SIGTERM"):
        assert checkpoint.step_of(newest) == updates(output)[-1] >= 2, log.read_text()[-3000:]
    assert not (output / ".lock").exists() or how.startswith("SIGKILL")
