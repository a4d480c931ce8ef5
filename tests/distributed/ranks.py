"""Functions run as the ranks of a process group: gloo on 127.0.0.1, with torchrun's variables, dead after a minute."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.helpers import free_port

# Forked from a process that has imported these and has no threads: a rank starts in a tenth of a second.
_IMPORTED = ["torch", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "real_fast.train"]
_GRACE = 5.0  # seconds that the others have after a rank's error


class RankError(AssertionError):
    """A rank raised, died or did not end in time; the message has its traceback."""


def run_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0, group: bool = True) -> list:
    """``function(*args)`` on each of `size` ranks; returns what each of them returned, by rank.

    Args:
        size: Number of ranks.
        function: Defined at the top of a module, since it is imported by its name there; it may ask
            ``torch.distributed.get_rank()``. It has one thread.
        args: Pickled, and so are the results.
        timeout: Seconds after which all ranks are killed.
        group: Start the process group; without, the function finds torchrun's variables alone.

    Raises:
        RankError: A rank raised, died or did not end in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    port = free_port()
    ends = [context.Pipe(duplex=False) for _ in range(size)]
    # By value: tensors that processes share are gone with the process that made them. What is unpickled here, and in a
    # rank, comes through a pipe from the test's own process and nowhere else; multiprocessing does the same by itself.
    call = pickle.dumps((function, args))
    ranks = [
        context.Process(target=_rank, args=(rank, size, port, call, timeout, group, send), daemon=True)
        for rank, (_, send) in enumerate(ends)
    ]
    try:
        for process in ranks:
            process.start()
        for _, send in ends:
            send.close()  # so that the other end tells of a rank that died
        return _results([receive for receive, _ in ends], time.monotonic() + timeout)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _results(pipes: list[Connection], end: float) -> list:
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    while len(results) + len(errors) < len(pipes):
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in results and rank not in errors]
        ready = wait(open_pipes, max(0.0, end - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                fine, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                fine, value = False, "it died without a word"
            (results if fine else errors)[rank] = value
            if not fine:  # the others may wait for it
                end = min(end, time.monotonic() + _GRACE)
    if errors or len(results) < len(pipes):
        hung = sorted(set(range(len(pipes))) - results.keys() - errors.keys())
        text = "".join(f"\nrank {rank}: {errors[rank]}" for rank in sorted(errors))
        raise RankError(text + (f"\nranks that did not end: {hung}" if hung else ""))
    return [results[rank] for rank in range(len(pipes))]


def _rank(rank: int, size: int, port: int, call: bytes, timeout: float, group: bool, send: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.fsync = lambda _: None  # as in conftest.py
    try:
        if group:
            dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
        function, args = pickle.loads(call)
        answer = (True, function(*args))
        if group:
            dist.barrier()  # none leaves while another still talks to it
            dist.destroy_process_group()
    except BaseException:  # told to whoever asked, whatever it is
        answer = (False, traceback.format_exc())
    send.send_bytes(pickle.dumps(answer))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may wait for ranks that are gone
