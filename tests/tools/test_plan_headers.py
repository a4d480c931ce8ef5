"""The plans in the headers of configs/ are what `real-fast plan` prints now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import plan_headers

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*gb.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_header_has_the_plan(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert plan_headers.with_plan(text) == text, "run: make tables"
    assert f"# real-fast plan --config {path.stem} --card " in text
    memory = re.search(r"^# FITS: the update takes [\d.]+ of (\d+) GiB, ", text, re.M)
    gpus = re.search(r"^# real-fast plan .* --gpus (\d+)$", text, re.M)
    assert memory and path.stem.endswith(f"-{gpus[1] + 'x' if gpus else ''}{memory[1]}gb")


def test_there_is_one_for_each_card_and_way() -> None:
    assert [path.stem for path in CONFIGS] == [
        *("qwen3-1.7b-full-24gb", "qwen3-32b-full-16x80gb", "qwen3-4b-full-80gb", "qwen3-8b-full-8x80gb"),
        *("qwen3-8b-lora-80gb", "qwen3-8b-qlora-24gb"),
    ]


def test_a_plan_replaces_the_one_before_and_nothing_else() -> None:
    path = CONFIGS[0]
    text = path.read_text(encoding="utf-8")
    stale = text.replace("# FITS: ", "# FITS, once: ")
    assert stale != text and plan_headers.with_plan(stale) == text
    assert plan_headers.with_plan("# words\n\nmodel: x\n") == "# words\n\nmodel: x\n"
