from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from real_fast.config.cli import load
from real_fast.prompt.builder import PromptBuilder
from real_fast.score.scale import ScoreScale
from real_fast.types import JudgeRow

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def run_python(code: str, cwd: Path) -> str:
    """Run `code` in an interpreter of its own that finds both packages; returns what it printed."""
    setup = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n"
    done = subprocess.run([sys.executable, "-c", setup + code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif("PYTEST_XDIST_WORKER_COUNT" not in os.environ, reason="one process takes all cores")
def test_processes_side_by_side_share_the_cores() -> None:
    """OpenMP took what tests/conftest.py says: torch was not imported before it, as by a plugin or by real_fast."""
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])


def test_kernels_is_a_folder_and_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "real_kernels" / "__init__.py").is_file()


def test_kernels_folder_does_not_pass_for_the_hugging_face_package() -> None:
    """Beside it, in the repository's root, ``import kernels`` finds the folder; Transformers must not be taken in."""
    if find_spec("kernels") and find_spec("kernels").origin:
        pytest.skip("the Hugging Face package kernels is installed, and goes before any folder")
    code = "import kernels, transformers.utils as u\nprint(kernels.__path__[0], u.is_kernels_available())"
    assert run_python(code, cwd=ROOT) == f"{ROOT / 'kernels'} False"


def test_real_kernels_needs_neither_real_fast_nor_transformers(tmp_path: Path) -> None:
    code = "import real_kernels\nprint([n for n in ('real_kernels', 'real_fast', 'transformers') if n in sys.modules])"
    assert run_python(code, cwd=tmp_path) == "['real_kernels']"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT / "configs").as_posix())
def test_config_loads_and_validates(path: Path) -> None:
    config = load(path)
    config.output = config.output or "runs/x"
    config.data.train = config.data.train or "rows.jsonl"
    config.validate()
    if Path(config.prompt.template).suffix:
        assert Path(ROOT, config.prompt.template).is_file()
    else:
        templates = {file.stem for file in (ROOT / "real_fast" / "prompt" / "templates").iterdir()}
        assert config.prompt.template in templates


def test_published_settings_are_there() -> None:
    learning_rates = {"mistral-7b-real": 5e-8, "qwen3-8b-real": 1e-6, "qwen3-32b-real": 1e-6}
    configs = {name: load(ROOT / "configs" / f"{name}.yaml") for name in learning_rates}
    assert {name: config.optim.lr for name, config in configs.items()} == learning_rates
    for config in configs.values():
        assert (config.rollout.prompts_per_step, config.rollout.group_size) == (256, 8)
        assert (config.prompt.max_tokens, config.rollout.max_tokens) == (2048, 1024)
        longest_group = config.rollout.group_size * (config.prompt.max_tokens + config.rollout.max_tokens)
        assert config.train.micro_batch_tokens >= longest_group


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT / "configs").as_posix())
def test_config_builds_its_prompts(path: Path, smollm2_tokenizer: Any) -> None:
    """With SmolLM2's tokenizer in place of the model's own, which would have to be downloaded."""
    config = load(path)
    scale = ScoreScale.from_tokenizer(smollm2_tokenizer, config.scale.values, config.scale.phrase)
    builder = PromptBuilder(config.prompt, smollm2_tokenizer, scale)
    row = JudgeRow("1", "1", "Name a fruit.", "Oak.", "Is it a fruit?", "Apple.", 1.0, [], [])
    text = smollm2_tokenizer.decode(builder.ids(row))
    assert all(part in text for part in ("Name a fruit.", "Oak.", "Is it a fruit?", "Apple.", scale.phrase.strip()))
    assert len(builder.ids(row)) <= config.prompt.max_tokens
