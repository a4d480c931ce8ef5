"""The second Ctrl-C ends a command that sits inside a library, and no command that has ended by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from real_fast.utils.interrupt import second_signal_ends

ROOT = Path(__file__).resolve().parents[2]
HASHING = "import hashlib; print('inside', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
TORCH = "import torch; x = torch.rand(4000, 4000); print('inside', flush=True); torch.linalg.eigvals(x)"


def run(work, *signals):
    """A process of its own in one long call of a library; its status, standard error, and seconds to its end."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from real_fast.errors import run_command\n"
        f"sys.exit(run_command('test', lambda: exec({work!r}), 'stopped at once'))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout.readline() == "inside\n"
        time.sleep(0.3)
        started = time.monotonic()
        for number in signals:
            process.send_signal(number)
            time.sleep(0.2)
        error = process.communicate(timeout=30)[1]
        return process.returncode, error, time.monotonic() - started
    finally:
        process.kill()


@pytest.mark.parametrize("work", [HASHING, TORCH], ids=["hashlib", "torch"])
def test_a_second_ctrl_c_ends_a_long_call_within_5_seconds(work):
    status, error, seconds = run(work, signal.SIGINT, signal.SIGINT)
    assert status == 130 and "stopped at once" in error and seconds < 5


def test_what_ends_in_time_is_not_ended_here():
    """The thread must have lost interest, or this process would be gone."""
    with second_signal_ends("never said", grace=0.5):
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
    time.sleep(0.7)
