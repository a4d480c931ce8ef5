"""A run that says what it is doing, so that it can be killed in the middle of it: real_fast.train in a child process.

Nothing here is in the product: the functions of its phases are wrapped, and files are watched by an audit hook.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# What a forkserver imports, so that a run starts in a tenth of a second.
IMPORTED = ["torch", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "real_fast.train"]
IMPORTED += ["peft", "PIL.Image", "tests.soak.child"]
# Audit events of what changes a folder, and which of their arguments is a path there.
_CHANGES = {"os.rename": 0, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0, "os.link": 0, "os.truncate": 0}
_WRITE = os.O_WRONLY | os.O_RDWR


@dataclass(frozen=True)
class Rank:
    """One process of a run.

    Attributes:
        rank: Its number.
        size: How many there are.
        port: Where they meet.
        output: The run's folder.
        log: The file that gets what it prints.
        die_at: Kill itself before this change of the folder, counted from 1; 0 for never.
    """

    rank: int
    size: int
    port: int
    output: Path
    log: Path
    die_at: int = 0


def run(rank: Rank, argv: list[str], send: Connection) -> None:
    """What a child process does. Sends (phase, begins) as it goes, and ("changes", their number) at the end."""
    with open(rank.log, "ab", 0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= {"OMP_NUM_THREADS": "1"}
    if rank.size > 1:
        numbers = {"RANK": rank.rank, "LOCAL_RANK": rank.rank, "WORLD_SIZE": rank.size, "LOCAL_WORLD_SIZE": rank.size}
        os.environ |= {name: str(number) for name, number in numbers.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(rank.port), "GLOO_SOCKET_IFNAME": "lo"}
    import torch

    from real_fast.train import main

    torch.set_num_threads(1)
    os.fsync = lambda _: None  # no kill cuts the power, and a short run flushes 70 files
    _draw_one_pixel()
    changes = _watch(rank.output, rank.die_at)
    _say_phases(send)
    sys.modules["trackio"] = SimpleNamespace(init=_nothing, log=_nothing, finish=_nothing)  # type: ignore[assignment]
    status = 1
    try:
        status = main(argv)
    except BaseException:  # as the interpreter's end would say it
        traceback.print_exc()
    send.send(("changes", changes()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # gloo's threads may wait for ranks that are gone: torchrun's own processes are tried too


def _nothing(*_: object, **__: object) -> None:
    """What a tracker does here: its state in the run's folder is what counts."""


def _watch(folder: Path, die_at: int) -> Callable[[], int]:
    """Count files that are opened for writing, renamed and removed below a folder; returns what gives the number."""
    count, lock, prefix = [0], threading.Lock(), str(folder)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            if not isinstance(args[0], str | os.PathLike) or not (args[2] or 0) & _WRITE:
                return
        elif event not in _CHANGES:
            return
        if not os.fsdecode(args[0] if not isinstance(args[0], int) else b"").startswith(prefix):
            return
        with lock:
            count[0] += 1
            if count[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: count[0]


def _say_phases(send: Connection) -> None:
    import real_fast.train as train
    from real_fast.methods import tract
    from real_fast.runs.run import Run
    from real_fast.runs.writer import _Job
    from real_fast.training.groups import GroupSource
    from real_fast.training.saving import Saver

    lock, stage = threading.Lock(), [""]

    def say(phase: str, begins: bool) -> None:
        with lock:
            send.send((stage[0] + phase, begins))

    def wrap(owner: Any, name: str, phase: Callable[..., str]) -> None:
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            what = phase(*args)
            say(what, True)
            found = inner(*args, **kwargs)
            say(what, False)
            return found

        setattr(owner, name, outer)

    def loading(trainer: Any, config: Any, *_: Any) -> str:
        if config.method == "tract":
            stage[0] = "stage 1: " if config.output.endswith("stage1") else "stage 2: "
        return "load"

    wrap(train.Trainer, "__init__", loading)
    wrap(train.Trainer, "evaluate", lambda *_: "evaluation")
    wrap(train.Trainer, "update", lambda *_: "update")
    wrap(train.Trainer, "save", lambda *_: "checkpoint")
    wrap(GroupSource, "next", lambda *_: "rollout")
    wrap(Saver, "final", lambda *_: "final save")
    wrap(train.report, "finish", lambda *_: "report")
    wrap(train, "warm_up", lambda *_: "warm-up")
    wrap(Run, "claim", lambda *_: "claim")
    wrap(tract, "sample_feedback", lambda *_: "self-generated feedback")
    wrap(_Job, "_run", lambda job: "writing a checkpoint" if "step-" in job.target.name else "writing final/")


def _draw_one_pixel() -> None:
    """Figures are written, but not drawn, which would take most of a tiny run's time."""
    from PIL import Image

    from real_fast.reports import health, report
    from real_fast.utils.files import replacing

    def pixel(path: Path) -> None:
        with replacing(path) as temporary:
            Image.new("RGB", (1, 1)).save(temporary, format="png")

    def draw(folder: Path, *_: object) -> None:
        for name in ("training.png", "before_after.png", "calibration.png"):
            pixel(folder / name)

    report.draw = draw
    health.health_curves = health.score_histogram = lambda _, path: pixel(path)
