"""Ahead-of-time compilation of every launch for every architecture: no GPU, and processes without the interpreter."""

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
def test_every_launch_compiles_without_spilling(arch, tmp_path):
    done = run("-m", "benchmarks.kernels", "--arch", arch, "--csv", str(tmp_path / "kernels.csv"))
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "kernels.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["kernel"] for line in lines} == {
        "logits", "dlogits", "base", "common_base", "combine", "reward", "scale", *["persistent"] * (arch == "sm_90")
    }  # fmt: skip
    products = [line for line in lines if line["kernel"] == "logits" and line["dtype"] != "fp32"]
    matrix = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}[arch]
    assert len(products) >= 25 and all(matrix in line["matrix_instructions"] for line in products)
    assert all(line["spills"] == "0" and line["verdict"] == "fine" for line in lines)
    # Every mode and kind of operand.
    variants = {line["variant"] for line in products}
    for epilogue in ("log-sum-exp", "kept logits, row base", "dlogits"):
        more = ("", ", bias", ", pointers", ", pointers, odd D", ", odd V")
        assert {epilogue + what for what in more} <= variants
    assert {f"{epilogue}, score tokens" for epilogue in ("log-sum-exp", "kept logits", "dlogits")} <= variants
    assert "kept logits" in variants  # float16
    assert {"log-sum-exp, entropy", "log-sum-exp, bias, soft-cap", "dlogits, score tokens, bias, soft-cap"} <= variants
    if arch == "sm_90":
        (persistent,) = [line for line in lines if line["kernel"] == "persistent"]
        assert persistent["variant"] == "kept logits, row base" and "bulk stores" in persistent["copies"]
    if arch in ("sm_90", "sm_100"):
        fetched = [line for line in products if "pointers" not in line["variant"]]
        assert all("cp.async.bulk.tensor" in line["copies"] for line in fetched)


# Each makes one thing worse in what sm_90 compiles for rows; its verdicts must say so.
WORSE = {
    "spills": "tile = Tile(128, 256, 64, 2, 4)",
    "bytes of shared memory": "tile = Tile(128, 128, 64, 9, 8)",
    "programs fit on a multiprocessor": "tile = Tile(128, 128, 64, 4, 8, programs=2)",
    "instructions behind the products": "kernels.BUDGET['log-sum-exp'] = (0, 4.3)",
}


def test_what_is_worse_is_found():
    code = (
        "from benchmarks import kernels, launches; from real_kernels.tiles import TILES, Tile; import torch\n"
        "from real_kernels import HeadOptions, linear_logprob\n"
        "def say(tile):\n"
        "    h, w = torch.randn(130, 128).bfloat16(), torch.randn(1024, 128).bfloat16()\n"
        "    with launches.compiled_for('sm_90', tile) as found, torch.no_grad():\n"
        "        linear_logprob(h, w, torch.zeros(130, dtype=torch.int64), head=HeadOptions(impl='triton'))\n"
        "    print(kernels.resources('sm_90', launches._named(*found[0], '', 'bf16', tile)).verdict)\n"
    )
    code += "".join(f"tile = TILES['sm_90'][1]; {change}; say(tile)\n" for change in WORSE.values())
    done = run("-c", code)
    verdicts = done.stdout.splitlines()
    assert len(verdicts) == len(WORSE), done.stderr
    for said, verdict in zip(WORSE, verdicts, strict=True):
        assert said in verdict, verdict


def test_the_launchers_own_arguments_are_compiled():
    """One token a row is a constant of the machine code, as the launcher binds it, and costs no registers."""
    code = (
        "from benchmarks.launches import launches\n"
        "launch = next(launches('sm_90', alternatives=False))\n"
        "names = launch.compiled.src.fn.arg_names\n"
        "print([launch.compiled.src.signature[name] for name in ('m', 'n', 'h')])"
    )
    done = run("-c", code)
    assert done.stdout.strip() == "['constexpr', 'i32', 'tensordesc<bf16[128, 64]>']", done.stdout + done.stderr
