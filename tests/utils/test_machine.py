"""What numbers are said to have been measured on."""

from __future__ import annotations

import pytest
import torch

from benchmarks.machine import machine as benchmarked
from real_fast.utils import machine

FLAGS = "fpu avx avx2 fma avx512f avx512_bf16 avx512_vnni"


def test_the_instructions_of_a_processor_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine._LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "_cpuinfo", {"flags": FLAGS, "model name": "Some CPU"}.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.cpu_instructions() == "avx2 avx512 avx512_bf16"
    assert machine.machine(torch.device("cpu"))["instructions"] == "avx2 avx512 avx512_bf16"
    assert benchmarked.__wrapped__()["machine"].startswith("Some CPU (avx2 avx512 avx512_bf16), ")
    monkeypatch.setattr(machine, "_cpuinfo", {"flags": f"{FLAGS} amx_bf16"}.get)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine.cpu_instructions() == "avx2 avx512 avx512_bf16 amx_bf16 ONEDNN_MAX_CPU_ISA=AVX2"
    monkeypatch.setattr(machine, "_cpuinfo", lambda _key: None)  # not Linux
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert machine.cpu_instructions() == ""
