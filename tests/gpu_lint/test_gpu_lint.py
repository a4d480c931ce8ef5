"""What a GPU would refuse, and where the host waits for it, found without one.

Pretended CUDA tensors need a process that was told of a device before PyTorch was imported. So the checks (check_*.py)
are a pytest run of their own, which these tests start.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_lint import build

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# In the other process, before pytest imports what imports PyTorch.
START = "import sys; from tests.gpu_lint import build; build.load(); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
OPTIONS = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout", "0", "--tb", "short", "-W", "ignore"]


@pytest.mark.timeout(900)
@pytest.mark.skipif(build.reason_against() is not None, reason=str(build.reason_against()))
def test_device_lint():
    """All checks in one process: most of the time of a second one would go into importing."""
    files = sorted(map(str, HERE.glob("check_*.py")))
    assert len(files) == 4
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", START, *OPTIONS, *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]


def test_a_missing_compiler_is_the_reason_to_skip(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    monkeypatch.setattr(build.runpy, "run_path", lambda _: {"cuda": None, "hip": None})
    monkeypatch.setattr(build.sys, "platform", "linux")
    assert "no C++ compiler" in build.reason_against()


def test_a_build_for_a_gpu_is_left_alone(monkeypatch):
    monkeypatch.setattr(build.runpy, "run_path", lambda _: {"cuda": "13.0"})
    assert "GPU" in build.reason_against()
