"""Ahead-of-time compilation of every kernel for every architecture: no GPU, and a process without the interpreter."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed here (it has no wheel for this platform)", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_compiles_without_spilling(arch, tmp_path):
    done = run("-m", "benchmarks.kernels", "--arch", arch, "--csv", str(tmp_path / "kernels.csv"))
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "kernels.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["kernel"] for line in lines} == {"logits", "dlogits", "combine", "reward"}
    products = [line for line in lines if line["kernel"] == "logits" and line["dtype"] != "fp32"]
    matrix = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}[arch]
    assert len(products) >= 14 and all(matrix in line["matrix_instructions"] for line in products)
    assert all(line["spills"] == "0" and line["verdict"] == "fine" for line in lines)
    if arch in ("sm_90", "sm_100"):
        fetched = [line for line in products if "pointers" not in line["variant"]]
        assert all("cp.async.bulk.tensor" in line["copies"] for line in fetched)


def test_a_bad_tile_is_found():
    """Four warps cannot hold 256 x 256 sums, and nine stages do not fit."""
    code = (
        "from benchmarks.kernels import compile_case, gemm; from real_kernels.tiles import Tile\n"
        "for tile in (Tile(256, 256, 64, 2, 4), Tile(128, 256, 64, 9, 8)):\n"
        "    print(compile_case(gemm('sm_90', 'bf16', tile, True, 'kept logits')).verdict)\n"
    )
    spilling, large = run("-c", code).stdout.splitlines()
    assert "spills" in spilling and "bytes of shared memory" in large
