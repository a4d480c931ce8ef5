"""A judge on the adapters that a run leaves, beside one on the same model merged: the same grades, in both engines."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from real_fast import Grade, Judge
from real_fast.train import main
from tests.golden.trajectories import run_flags
from tests.judging.fakes import ROW

pytest.importorskip("peft")

ROWS = [ROW, ROW | {"response": "A stone."}, ROW | {"instruction": "Name a stone.", "response": "A fruit."}]
VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], golden_model: Path) -> Path:
    """A run that trained adapters on a model that vLLM computes on a CPU too: merged in final/, alone in adapter/."""
    from transformers import AutoTokenizer

    base, output = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapted") / "run"
    tokenizer = AutoTokenizer.from_pretrained(golden_model)
    tiny_llama(True, len(tokenizer), 128, head_dim=32, initializer_range=0.08).save_pretrained(base)
    tokenizer.save_pretrained(base)
    # A large rate, so that what the adapters say is far from what the model says without them.
    flags = ["--train.lora.r", "4", "--optim.lr", "5e-2", "--train.steps", "2", "--warmup.steps", "0", "--save.merge"]
    assert main(run_flags(base, output, *flags)) == 0
    shutil.copytree(base, output / "base")
    shutil.copy(output / "final" / "real_fast.json", output / "base")
    return output


def graded(folder: Path, engine: Any) -> list[Grade]:
    with Judge(folder, engine=engine, temperature=0.0, precision="fp32", device="cpu") as judge:
        return judge.grade_batch(ROWS)


@pytest.mark.e2e
@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=VLLM)])
def test_adapters_grade_as_the_merged_model_does(run: Path, engine: str) -> None:
    """In vLLM, ``load_engine`` puts the adapters beside the base; the merged model is graded with Transformers."""
    adapters, whole, base = (
        graded(run / "adapter", engine),
        *(graded(run / f, "transformers") for f in ("final", "base")),
    )
    for a, b, c in zip(adapters, whole, base, strict=True):
        assert a.feedback == b.feedback and a.distribution == pytest.approx(b.distribution, abs=2e-4)
        assert a.feedback != c.feedback or a.distribution != pytest.approx(c.distribution, abs=1e-2)
