from __future__ import annotations

import mmap

import pytest
import torch

from real_fast.training import peak_memory
from real_fast.training.peak_memory import GIB, PeakMemory


def test_the_peak_of_each_phase_counts_from_the_mark_before():
    memory = PeakMemory(torch.device("cpu"))
    memory.mark("")
    if peak_memory._peak_resident() is None:
        pytest.skip("this system does not count it")
    with mmap.mmap(-1, 2**27) as taken:  # 128 MiB, given back, whatever the process's allocator would keep
        taken.write(b"1" * 2**20 * 128)
    memory.mark("rollout")
    memory.mark("update")
    found = memory.metrics(GIB // 2, asleep=False)
    assert found["memory/rollout_gib"] - found["memory/update_gib"] > 0.1
    assert found["memory/engine_gib"] == found["memory/engine_update_gib"] == 0.5
    assert memory.metrics(GIB // 2, asleep=True)["memory/engine_update_gib"] == 0


def test_where_nothing_is_counted_nothing_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(peak_memory, "_STATUS", tmp_path / "none")
    memory = PeakMemory(torch.device("cpu"))
    memory.mark("update")
    assert memory.metrics(0, asleep=False) == {"memory/engine_gib": 0, "memory/engine_update_gib": 0}
