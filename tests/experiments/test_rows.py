"""The experiment's rows: what is graded shares nothing with what is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import data
from experiments.duplicates import nearest
from experiments.settings import load
from experiments.sources import Data, Source, shortened
from real_fast.config import PromptConfig
from real_fast.errors import DataError
from real_fast.prompt.builder import PromptBuilder
from real_fast.score.scale import ScoreScale
from real_fast.utils.jsonio import read_jsonl
from tests.experiments.tiny import TINY, write_files, written


def test_what_is_shortened() -> None:
    row = {
        "rubric": "[Is it clear?]\nScore 1: no.\nScore 5: yes.",
        "reference_answer": "one two  three",
        "feedbacks": ['It is e.g. clear (mostly). However, it ends early! "Why?" asks nobody.', "Short"],
        "score": 4,
    }
    short = shortened(row, Data({}, rubric="question", sentences=2), Source("f", reference_words=2, rescale=[0, 5]))
    assert short == {
        "rubric": "Is it clear?",
        "reference_answer": "one two",
        "feedbacks": ["It is e.g. clear (mostly). However, it ends early!", "Short"],
        "score": pytest.approx(4.2),
    }
    assert "reference_answer" not in shortened(row, Data({}), Source("f", reference_words=0, rubric="Good?"))
    assert shortened(row, Data({}), Source("f", rubric="Good?")) == {**row, "rubric": "Good?"}
    assert shortened(row, Data({}), Source("f")) == row


def pairs(*texts: tuple[str, str, str]) -> list[dict[str, Any]]:
    """Rows of two sentences, with their split."""
    return [
        {"id": f"{i}", "prompt_id": a, "instruction": a, "response": b, "split": split}
        for i, (split, a, b) in enumerate(texts)
    ]


def test_neither_sentence_of_a_held_out_row_is_trained_on() -> None:
    rows = pairs(
        ("dev", "A plane takes off.", "An air plane takes off."),
        ("train", "a plane  takes OFF.", "Something else."),
        ("train", "Quite other.", "An air plane takes off."),
        ("train", "An air plane takes off.", "In the other place."),
        ("train", "A plane is taking off.", "An airplane takes off!"),
        ("train", "Two dogs run on the beach.", "Dogs are running."),
        ("train", "Stocks fall in Asia.", "Asian markets go down."),
    )
    one = Source("f", ["train"], ["dev"], dev_share=0.0, apart=["instruction", "response"])
    parts, found = data.divided(rows, one, 0.9)
    assert [row["id"] for row in parts["train"]] == ["4", "5", "6"] and found == {"shared": 3, "near": {}}
    # What differs by a few letters alone is found too, and left out where that is asked for.
    one.near, one.drop_near = ["instruction", "response"], True
    parts, found = data.divided(rows, one, 0.5)
    assert [row["id"] for row in parts["train"]] == ["5", "6"]
    assert found["near"]["train to test"] == {"rows": 1, "dropped": 1, "examples": [("4", "0")]}
    one.drop_near = False
    parts, found = data.divided(rows, one, 0.5)
    assert len(parts["train"]) == 3 and found["near"]["train to test"]["rows"] == 1
    # Of all that could be graded nothing is trained on, however little is graded.
    one.test_rows = 1
    more = [*rows, *pairs(("dev", "Stocks fall in Asia.", "Other words."))]
    more[-1]["id"] = "7"
    assert "6" not in {row["id"] for row in data.divided(more, one, 2.0)[0]["train"]}


def test_the_nearest_text() -> None:
    assert nearest([], ["a"]) == [] == nearest(["a"], [])
    (place, cosine), (_, apart) = nearest(["The cat sat.", "xyz"], ["A dog ran.", "the cat sat"])
    assert place == 1 and cosine == pytest.approx(1) and apart == 0


def test_rows_are_limited_by_their_ids_alone() -> None:
    rows = [{"id": f"{i}"} for i in range(50)]
    some = data.limited(rows, 20)
    assert len(some) == 20 and some != rows[:20] and [r for r in rows if r in some] == some
    assert {r["id"] for r in data.limited(rows[::-1], 10)} < {r["id"] for r in some}
    assert data.limited(rows, 0) == rows


def test_the_split_holds_out_whole_prompts(tmp_path: Path, smollm2_tokenizer: Any) -> None:
    files = write_files(tmp_path / "files")
    scale = ScoreScale.from_tokenizer(smollm2_tokenizer, [1, 2, 3, 4, 5], "So the overall score is ")
    prompt = PromptConfig(template="short", system="", max_tokens=400)
    builder = PromptBuilder(prompt, smollm2_tokenizer, scale)
    experiment = load(written(tmp_path / "e.yaml"), tmp_path)

    def prepared(name: str) -> dict[str, Any]:
        file = data.prepare(experiment, files, tmp_path / name, prompt, builder, scale)
        return json.loads(file.read_text(encoding="utf-8"))

    split = prepared("a")
    assert prepared("b")["fingerprint"] == split["fingerprint"] == data.fingerprint(tmp_path / "a")
    train, dev, test = (read_jsonl(tmp_path / "a" / f"{part}-seen.jsonl") for part in ("train", "dev", "test"))
    prompts = [{row["prompt_id"] for row in some} for some in (train, dev, test)]
    assert all(prompts) and not prompts[0] & prompts[1] and not prompts[2] & (prompts[0] | prompts[1])
    assert {row["split"] for row in train + dev} == {"a"} and {row["split"] for row in test} == {"a", "b"}
    new = read_jsonl(tmp_path / "a" / "test-new.jsonl")
    counts = split["counts"]
    assert len(new) == counts["new"]["test"] == 9 and len(test) == counts["seen"]["test"] == 20
    assert len(read_jsonl(tmp_path / "a" / "averaged-seen.jsonl")) == 6
    assert counts["seen"]["train"] == len(train) and counts["seen"]["near"].keys() == {
        "dev to test", "train to test", "train to dev",
    }  # fmt: skip
    assert not list((tmp_path / "a").glob("*.tmp.*"))
    # Shorter prompts alone: other rows, of the same held-out prompts.
    prompt.max_tokens = sorted(len(row.prompt_ids) for row in map_rows(files, builder, scale))[40]
    short = prepared("c")
    assert short["counts"]["seen"]["left_out"]["prompt is too long"] > 0
    assert short["fingerprint"] != split["fingerprint"]
    assert {row["prompt_id"] for row in read_jsonl(tmp_path / "c" / "train-seen.jsonl")} <= prompts[0]
    with pytest.raises(DataError, match="rows of other settings"):
        prepared("a")
    experiment.data.sources["gone"] = Source("gone.jsonl")
    with pytest.raises(DataError, match=r"gone\.jsonl is missing: .*--data"):
        prepared("d")


def map_rows(files: Path, builder: PromptBuilder, scale: ScoreScale) -> list[Any]:
    """The rows of a file with their prompts."""
    from real_fast.data.dataset import load_rows

    return load_rows(str(files / "seen.jsonl"), "", builder, scale, 400, [])


def test_the_tiny_settings_are_those_of_an_experiment(tmp_path: Path) -> None:
    assert list(load(written(tmp_path / "e.yaml"), tmp_path).methods) == list(TINY["methods"])
