"""gpu_check on a machine that has PyTorch, Triton and Transformers, and nothing else of what these tests have."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.benchmarks import bare

ROOT = Path(__file__).resolve().parents[2]
CARD = ("torch", "triton", "transformers")
ABSENT = ("jsonargparse", "datasets", "trl", "gguf", "vllm", "liger_kernel", "matplotlib", "scipy", "peft", "pytest")

# As python -m benchmarks.gpu_check, but that garbage is not looked for among what imports made, after every contender.
START = "import gc, sys; from benchmarks import gpu_check, lora_step, report; gc.freeze(); sys.exit(gpu_check.main())"


def run(env: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280
    )


def test_the_bare_environment_is_bare(tmp_path):
    """In what it starts, too; or the test below would prove nothing."""
    env = bare.make(tmp_path, CARD, ROOT)
    names = (*CARD, "tokenizers", "safetensors", "numpy", "real_fast", "real_kernels", *ABSENT)
    code = f"import importlib.util as u, sys; print([n for n in {names} if u.find_spec(n)])"
    again = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {code!r}]))"
    here = [name for name in names if name not in ABSENT and importlib.util.find_spec(name)]
    for text in (code, again):
        assert run(env, "-c", text).stdout.split("\n")[0] == str(here)


@pytest.mark.timeout(300)
def test_gpu_check_runs_to_its_end(tmp_path):
    """Every part that needs none of what is absent; the others say what they need. torch.compile is left to others."""
    out = tmp_path / "out"
    env = bare.make(tmp_path, CARD, ROOT) | {"TORCH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    env["REAL_FAST_RESULTS"] = str(out)
    done = run(env, "-c", START, str(out), "--small")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "failed" not in done.stdout, done.stdout
    stages = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert len(stages) == 14 and not [line for line in stages if "left out" in line], stages
    said = ("not installed here: pytest", "measured peak", "bf16: loss differs by", "LoRA step left out", "real-fast")
    said += ("0 wrong; at worst", "sdpa's by", "torch.mm: logits", "dlogits", "tests left out: not installed: pytest")
    said += ("| CCE | not installed |", "| TRL GRPOTrainer | not installed |", "44.5 ms", "flex left out")
    assert not [words for words in said if words not in done.stdout], done.stdout
    assert {"benchmarks.csv", "summary.json", "gpu-check.txt", "gpu-check.tar.gz"} == {f.name for f in out.iterdir()}
    with tarfile.open(out / "gpu-check.tar.gz") as archive:
        assert {"benchmarks.csv", "gpu-check.txt", "profile-tiny.txt"} <= set(archive.getnames())
