"""The kernels at odd sizes under compute-sanitizer, in a process of their own: reads and writes out of bounds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.stages import Check
from benchmarks.machine import ROOT

NAME = "compute-sanitizer"
FAULTS = 9  # its exit status where it found one
LOG = "sanitizer.txt"


def find() -> str | None:
    """Where it is: on the path, or with the toolkit."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    for place in (shutil.which(NAME), *(str(Path(home, "bin", NAME)) for home in homes if home)):
        if place and os.access(place, os.X_OK):
            return place
    return None


def run(check: Check, end: float) -> int:
    """The stage. Returns 1 if it found a fault, or the process did not end well; 0 where it is not installed."""
    tool = find()
    if tool is None:
        print(f"{NAME} is not installed here: reads and writes out of bounds are not looked for")
        return 0
    child = [sys.executable, "-m", "benchmarks.gpu.exact", *(["--cases", "3"] if check.small else [])]
    command = [tool, "--tool", "memcheck", f"--error-exitcode={FAULTS}", *child]
    # With PyTorch's cache a read behind a tensor's end lands in another one, and is none out of bounds.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    log = check.details / LOG
    seconds = max(1.0, end - time.monotonic())
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            print(f"{NAME}: not done in {seconds:.0f} s, which says nothing; see {LOG}")
            return 0
    told = [line for line in log.read_text(encoding="utf-8").splitlines() if "SUMMARY" in line or "kernels:" in line]
    print("\n".join(told))
    if done.returncode == 0:
        return 0
    what = "faults" if done.returncode == FAULTS else f"exit status {done.returncode}"
    print(f"{NAME}: {what}; see {LOG}")
    return 1
