"""Runs in child processes that are killed on purpose, one process or ranks; for ranks this plays torchrun's agent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.helpers import free_port
from tests.soak.child import IMPORTED, Rank, run

ALONE = 5.0  # seconds that the ranks left over have to end by themselves, in the kills that try that
TOLD = 20.0  # and seconds after SIGTERM; torchrun gives 30 before SIGKILL
BETWEEN = "between two phases"
_LONGEST = 90.0  # seconds of one run, which takes about 2


@dataclass(frozen=True)
class Kill:
    """When and whom.

    Attributes:
        phase: What the watched rank is doing; "" for a change of the folder.
        at: The so manieth time that it does so; or the so manieth change.
        after: Seconds from the phase's beginning.
        victims: Ranks; the first is the one that is watched.
        signalled: Whether the others get SIGTERM at once, as torchrun sends it; else they have a while to end.
    """

    phase: str
    at: int
    after: float = 0.0
    victims: tuple[int, ...] = (0,)
    signalled: bool = True

    def __str__(self) -> str:
        ranks = f", ranks {self.victims}" if self.victims != (0,) else ""
        if not self.phase:
            return f"before change {self.at} of the folder{ranks}"
        return f"{self.after * 1000:.1f} ms into {self.phase!r} no. {self.at}{ranks}"


@dataclass
class Ended:
    """How a run ended.

    Attributes:
        statuses: Exit status of each rank; negative for a signal.
        killed: Whether the kill happened.
        during: The phase of the watched rank that the kill hit, which may be another than was planned; "" for a change
            of the folder.
        phases: Of rank 0, in their order: name and seconds.
        changes: Of the folder, by rank 0.
        problem: What must not be: a rank that did not end.
        alone: Seconds that the ranks left over took to end without a signal; None where not tried.
    """

    statuses: list[int | None]
    killed: bool = False
    during: str = ""
    phases: list[tuple[str, float]] = field(default_factory=list)
    changes: int = 0
    problem: str | None = None
    alone: float | None = None


def attempt(argv: Sequence[str], output: Path, log: Path, size: int = 1, kill: Kill | None = None) -> Ended:
    """Run real_fast.train and, if asked, kill it. Every process has ended when this returns."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    watched = kill.victims[0] if kill else 0
    processes = []
    for number, (_, send) in enumerate(pipes):
        die_at = kill.at if kill and not kill.phase and number == watched else 0
        rank = Rank(number, size, port, output, log, die_at)
        processes.append(context.Process(target=run, args=(rank, list(argv), send), daemon=True))
    try:
        for process in processes:
            process.start()
        for _, send in pipes:
            send.close()
        return _attend(processes, [receive for receive, _ in pipes], kill)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _attend(processes: list[Any], pipes: list[Connection], kill: Kill | None) -> Ended:
    ended, seen = Ended([None] * len(processes)), 0
    watched = kill.victims[0] if kill else 0
    began: dict[str, float] = {}
    open_pipes, end = list(pipes), time.monotonic() + _LONGEST
    while open_pipes and not ended.killed:
        ready = wait(open_pipes, max(0.0, end - time.monotonic()))
        if not ready:
            ended.problem = f"it had not ended after {_LONGEST:.0f} s"
            break
        for pipe in ready:
            try:
                name, value = pipe.recv()
            except (EOFError, OSError):
                open_pipes.remove(pipe)
                ended.killed = ended.killed or _died(kill, processes[pipes.index(pipe)])
                continue
            if pipe is not pipes[watched]:
                continue
            if name == "changes":
                ended.changes = value
            elif not value and name in began:
                ended.phases.append((name, time.monotonic() - began.pop(name)))
            elif value:
                began[name] = time.monotonic()
                seen += kill is not None and name == kill.phase
                if kill and name == kill.phase and seen == kill.at and value:
                    time.sleep(kill.after)
                    ended.killed = all(processes[victim].is_alive() for victim in kill.victims)
                    break
    if kill and ended.killed:
        _kill(processes, kill, ended)
        if kill.phase:
            ended.during = _hit(pipes[watched], kill.phase, list(began))
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
    ended.statuses = [process.exitcode for process in processes]
    return ended


def _hit(pipe: Connection, planned: str, running: list[str]) -> str:
    """What a rank that was killed did last: the planned phase, where it was still in it; else the latest begun.

    Args:
        pipe: Has what the rank sent before its end.
        planned: The phase.
        running: Phases, in their order, which it was in when the phase began.
    """
    try:
        while pipe.poll():
            name, value = pipe.recv()
            if name in running and value is not True:
                running.remove(name)
            elif value is True:
                running.append(name)
    except (EOFError, OSError):
        pass
    return planned if planned in running else [BETWEEN, *running][-1]


def _died(kill: Kill | None, process: Any) -> bool:
    """Whether a rank has killed itself, as it was told."""
    process.join(5)
    return kill is not None and not kill.phase and process.exitcode == -signal.SIGKILL


def _kill(processes: list[Any], kill: Kill, ended: Ended) -> None:
    for victim in kill.victims:
        processes[victim].kill()
    others = [process for number, process in enumerate(processes) if number not in kill.victims]
    began = time.monotonic()
    if not kill.signalled and others and _all_end(others, ALONE):
        ended.alone = time.monotonic() - began
    time.sleep(0.1)  # torchrun looks ten times a second
    for process in others:
        process.terminate()  # one that has ended meanwhile is left alone
    if not _all_end(others, TOLD):
        left = [number for number, process in enumerate(processes) if process.is_alive()]
        ended.problem = f"ranks {left} had not ended {TOLD:.0f} s after SIGTERM"


def _all_end(processes: list[Any], seconds: float) -> bool:
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    return not any(process.is_alive() for process in processes)


def side_by_side(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the calls return; as many at a time as there are cores for."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(max(1, min(2, os.cpu_count() or 1))) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]
