"""Faults that a test injects: engines, numbers, secrets and code. Each case of a test is one.

They run in ``make test`` too; here they are counted, a row for each test.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.machine import ROOT
from tests.soak.record import Found, by_kind

# The tests, and what the page calls them.
SUITES = {
    "engine": ["tests/rollout/test_engine_faults.py"],
    "numbers": ["tests/training/test_number_faults.py"],
    "secrets and code": ["tests/test_secrets.py"],
    "lock": ["tests/runs/test_lock.py"],
}


def run(folder: Path, share: float) -> Found:
    """Run them; `share` changes nothing, since they are quick. Skipped cases are not counted, and noted."""
    outcomes: list[tuple[str, str | None]] = []
    notes: list[str] = []
    for name, files in SUITES.items():
        report = folder / f"{name}.xml"
        command = [sys.executable, "-m", "pytest", *files, "-q", "-o", "junit_family=xunit2", f"--junitxml={report}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not report.is_file():
            raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout[-2000:]}")
        for case in ElementTree.parse(report).iter("testcase"):
            test = case.attrib["name"]
            kind = f"{name}: {test.partition('[')[0].removeprefix('test_').replace('_', ' ')}"
            if (skipped := case.find("skipped")) is not None:
                notes.append(f"{kind}: not run ({skipped.attrib.get('message', '')})")
                continue
            failed = case.find("failure") if case.find("failure") is not None else case.find("error")
            outcomes.append((kind, None if failed is None else f"{test}: {failed.attrib.get('message', '')[:200]}"))
    return Found(by_kind(outcomes), notes=sorted(set(notes)))
