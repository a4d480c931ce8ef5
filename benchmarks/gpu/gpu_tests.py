"""The tests marked ``gpu``, several processes at a time, the kernels' first."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.stages import Check
from benchmarks.machine import ROOT

# Tests spend their time compiling kernels, a process one at a time.
WORKERS = max(1, min(8, (os.cpu_count() or 1) // 2))
LOG = "gpu-tests.txt"
NOTHING_COLLECTED = 5
_TOLD = ("FAILED", "ERROR", "E  ", "stopped")


def test_files() -> list[Path]:
    """Test files that hold a test marked gpu, the kernels' first."""
    found = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    return sorted(found, key=lambda path: path.parent.name != "real_kernels")


def run(check: Check, end: float) -> int:
    """The stage. Returns 1 if a test failed or was stopped; 0 where pytest is not installed, which is said."""
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"tests left out: not installed: {', '.join(missing)}")
        return 0
    failed = _run(check.details, end)
    lines = (check.details / LOG).read_text(encoding="utf-8").splitlines()
    print("\n".join(line for line in lines if line.startswith(_TOLD) or " in " in line)[-4000:])
    return failed


def _run(folder: Path, end: float) -> int:
    # Without the project's pytest settings, which ask for plugins that may not be there.
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT), "--import-mode=importlib"]
    command += ["-m", "gpu", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    seconds = max(1.0, end - time.monotonic())
    listed = subprocess.run(
        [*command, "--collect-only", *map(str, test_files())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    log = folder / LOG
    tests = [line for line in listed.stdout.splitlines() if "::" in line and not line.startswith("ERROR")]
    if not tests:
        log.write_text(listed.stdout + listed.stderr, encoding="utf-8")
        return int(listed.returncode not in (0, NOTHING_COLLECTED))
    size = -(-len(tests) // WORKERS)
    running = []
    for i, start in enumerate(range(0, len(tests), size)):
        # Neighbours compile the same kernels, so they go to one process.
        file = (folder / f"gpu-tests-{i}.txt").open("w", encoding="utf-8")
        part = [*command, *tests[start : start + size]]
        running.append((subprocess.Popen(part, cwd=ROOT, stdout=file, stderr=file), file))
    failed = listed.returncode not in (0, NOTHING_COLLECTED)
    for process, file in running:
        try:
            failed |= process.wait(max(1.0, end - time.monotonic())) not in (0, NOTHING_COLLECTED)
        except subprocess.TimeoutExpired:
            process.kill()
            file.write(f"\nstopped after {seconds:.0f} s\n")
            failed = True
        file.close()
    with log.open("w", encoding="utf-8") as whole:
        whole.write(listed.stderr)
        for text in sorted(folder.glob("gpu-tests-*.txt")):
            whole.write(text.read_text(encoding="utf-8"))
            text.unlink()
    return int(failed)
