"""Keeps a library that is run in the trainer's process from changing that process."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def process_state_kept(seeded: bool = True) -> Iterator[None]:
    """Undo what vLLM does to the process it runs in: random states, number of threads, bound cores.

    Without it vLLM seeds the trainer's generators, takes ``torch.set_num_threads`` away, and (OMP_NUM_THREADS unset)
    sets the threads to 1.

    Args:
        seeded: Whether Python's and NumPy's generators may have been seeded, and are put back. What another thread drew
            from them meanwhile, it then draws again; torch's are put back in any case.
    """
    threads, set_threads, omp = torch.get_num_threads(), torch.set_num_threads, os.environ.get("OMP_NUM_THREADS")
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    python, numpy = random.getstate(), np.random.get_state()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        if omp is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        torch.set_num_threads = set_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if cores is not None and os.sched_getaffinity(0) != cores:
            os.sched_setaffinity(0, cores)
        if seeded:
            random.setstate(python)
            np.random.set_state(numpy)
