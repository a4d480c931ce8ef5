"""Faults that a test injects: engines, numbers, locks, judges in threads and forks, secrets. Each case is one.

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
    "engine": [
        "tests/rollout/test_engine_faults.py",
        "tests/rollout/test_vllm_protocol.py",
        "tests/rollout/test_vllm_server.py",
    ],
    "numbers": ["tests/training/test_number_faults.py"],
    "lock": ["tests/runs/test_lock.py"],
    "judge": ["tests/judging/test_sharing.py", "tests/judging/test_waiting.py"],
    "secrets and code": ["tests/test_secrets.py"],
}
_LIMIT_S = 1800


def run(folder: Path, share: float) -> Found:
    """Run them; `share` changes nothing, since they are quick. Skipped cases are not counted, and noted."""
    outcomes: list[tuple[str, str | None]] = []
    notes: list[str] = []
    for name, files in SUITES.items():
        report = folder / f"{name}.xml"
        command = [sys.executable, "-m", "pytest", *files, "-q", "-o", "junit_family=xunit2", f"--junitxml={report}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=_LIMIT_S)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
        if done.returncode not in (0, 1) or not cases:
            raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout[-2000:]}")
        for case in cases:
            test = case.attrib["name"]
            kind = f"{name}: {test.partition('[')[0].removeprefix('test_').replace('_', ' ')}"
            if (skipped := case.find("skipped")) is not None:
                notes.append(f"{kind}: not run ({skipped.attrib.get('message', '')})")
                continue
            failed = case.find("failure") if case.find("failure") is not None else case.find("error")
            outcomes.append((kind, None if failed is None else f"{test}: {failed.attrib.get('message', '')[:200]}"))
    return Found(by_kind(outcomes), notes=sorted(set(notes)))
