"""What the CPU is thought to multiply fast."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from real_kernels import cpu

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.fixture(autouse=True)
def asked_anew():
    cpu.has_fast_bf16.cache_clear()
    yield
    cpu.has_fast_bf16.cache_clear()


def test_no_instructions_no_measurement(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(cpu, "_seconds", lambda: pytest.fail("measured"))
    assert cpu.has_fast_bf16() == (False, "oneDNN finds no bfloat16 instructions on this CPU")


def test_no_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    fast, why = cpu.has_fast_bf16()
    assert not fast and "without oneDNN" in why


@pytest.mark.parametrize(("seconds", "fast"), [((1e-3, 2e-3), True), ((2e-3, 1e-3), False), ((1e-3, 1.1e-3), False)])
def test_the_measurement_decides(monkeypatch, seconds, fast):
    """oneDNN says yes where it emulates bfloat16, too."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(cpu, "_seconds", lambda: seconds)
    found, why = cpu.has_fast_bf16()
    assert found is fast and f"{2e-9 * 128 * 256 * 512 / seconds[0]:.0f} GFLOP/s" in why


def test_it_is_quick_and_asked_once():
    start = time.process_time()  # others may keep the cores busy meanwhile
    threads = torch.get_num_threads()
    answer = cpu.has_fast_bf16()
    assert torch.get_num_threads() == threads
    assert time.process_time() - start < 1
    assert cpu.has_fast_bf16() is answer


def test_a_cpu_held_to_avx2_is_slow():
    """As most laptops are."""
    held = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(KERNELS)}
    code = "from real_kernels.cpu import has_fast_bf16; print(has_fast_bf16())"
    said = subprocess.run([sys.executable, "-c", code], env=held, capture_output=True, text=True, check=True).stdout
    assert said.startswith("(False")
