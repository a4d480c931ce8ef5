"""A disk that is full, read-only or failing, at every write of a run; and every file of a run damaged, then a resume.

Survived is what disk_trials.py and damage.py say: the command stops and names file and remedy, no checkpoint is lost,
and what follows ends in the weights, metrics and evaluations of the undisturbed run, to the last bit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.machine import ROOT
from real_fast.utils.jsonio import read_jsonl
from tests.soak.faulty_disk import missing, preloaded
from tests.soak.record import Found, by_kind

# How many ways each operation fails in; below 1, that share of the operations in one way.
SHARES = {
    "real": 1.0,
    "real in the background": 0.15,
    "LoRA, merged": 0.1,
    "tract": 0.08,
    "evaluate": 1.0,
    "judge": 3.0,
    "compare": 2.0,
    "damage of real": 0.6,
    "damage of LoRA, merged": 0.2,
    "damage of tract": 0.5,
}


def run(folder: Path, share: float) -> Found:
    """Try them, in one process after another."""
    if why := missing():
        return Found(notes=[f"not run: {why}"])
    outcomes = tried(folder, {case: part * share for case, part in SHARES.items()})
    return Found(by_kind(outcomes), notes=["Flushing to the disk is left out: nobody cuts the power here."])


def tried(folder: Path, shares: Mapping[str, float]) -> list[tuple[str, str | None]]:
    """Outcomes of some cases, in a process whose disk can fail: kinds, and what was lost."""
    from tests.soak.disk_trials import OUTCOMES

    path = f"{ROOT}:{ROOT / 'kernels'}"
    env = {**preloaded(folder), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    home = folder / "home"
    command = [sys.executable, "-m", "tests.soak.disk_trials", str(home), json.dumps(dict(shares))]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise RuntimeError(f"the trials ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return [(kind, problem) for kind, problem in read_jsonl(home / OUTCOMES)]
