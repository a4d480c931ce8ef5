"""A disk that is full, read-only or failing, at every write of a run; and every file of a run damaged, then a resume.

Survived is what disk_trials.py and damage.py say: the command stops and names file and remedy, no checkpoint is lost,
and what follows ends in the weights, metrics and evaluations of the undisturbed run, to the last bit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from benchmarks.machine import ROOT
from real_fast.utils.jsonio import read_jsonl
from tests.soak.faulty_disk import missing, preloaded
from tests.soak.launch import side_by_side
from tests.soak.record import Found, by_kind

# How many ways each operation fails in; below 1, that share of the operations in one way. Of damage, the share of all.
# One process for each, about as long as the other.
SHARES = (
    {
        "real": 0.75,
        "evaluate": 1.0,
        "judge": 3.0,
        "compare": 2.0,
        "newest checkpoint of real": 1.0,
    },
    {
        "writes of real": 1.0,
        "real in the background": 0.15,
        "LoRA, merged": 0.1,
        "sft": 0.1,
        "tract": 0.08,
        "newest checkpoint of LoRA, merged": 1.0,
        "damage of real": 0.6,
        "damage of LoRA, merged": 0.2,
        "damage of tract": 0.5,
    },
)
NOTES = [
    "Flushing to the disk is left out: nobody cuts the power here.",
    "Runs on one process alone: a disk that fails for one of several ranks is not among the faults.",
]


def run(folder: Path, share: float) -> Found:
    """Try them, in two processes."""
    if why := missing():
        return Found(notes=[f"not run: {why}"])
    calls = []
    for number, shares in enumerate(SHARES):
        (folder / str(number)).mkdir()
        wanted = {case: part * share for case, part in shares.items()}
        calls.append(partial(tried, folder / str(number), wanted))
    outcomes = [outcome for found in side_by_side(calls) for outcome in found]
    return Found(by_kind(sorted(outcomes, key=lambda outcome: outcome[0])), notes=NOTES)


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
