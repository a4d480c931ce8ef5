from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest

from real_fast.config import PromptConfig
from real_fast.data import synthetic
from real_fast.data.rows import parse_row
from real_fast.prompt.builder import PromptBuilder
from real_fast.score.scale import ScoreScale


@pytest.fixture(scope="module")
def both() -> dict[str, list[dict[str, Any]]]:
    return {which: synthetic.generate(*size, seed=0, which=which) for which, size in synthetic.SIZES.items()}


@pytest.mark.parametrize("which", ["train", "eval", "all"])
def test_labels_are_the_number_of_right_items(which: str) -> None:
    known = synthetic.categories(which)
    for row in synthetic.generate(60, 5, seed=3, which=which):
        items = row["response"].split(", ")
        right = [item for item in items if item in known[row["category"]]]
        assert len(set(items)) == 5
        assert row["score"] == max(1, len(right))
        assert row["category"] in row["instruction"]
        assert all(any(item in others for others in known.values()) for item in items)


def test_feedback_determines_the_score_and_does_not_state_it(both: dict[str, list[dict[str, Any]]]) -> None:
    for row in both["train"] + both["eval"]:
        known = synthetic.categories("all")[row["category"]]
        verdicts = re.findall(r"(\w+) (yes|no)[,.]", row["feedback"])
        assert [item for item, _ in verdicts] == row["response"].split(", ")
        assert all((verdict == "yes") == (item in known) for item, verdict in verdicts)
        assert max(1, sum(verdict == "yes" for _, verdict in verdicts)) == row["score"]
        assert not re.search(r"\d|score", row["feedback"])


def test_scores_are_balanced_and_ids_unique(both: dict[str, list[dict[str, Any]]]) -> None:
    for which, rows in both.items():
        prompts, each = synthetic.SIZES[which]
        assert len(rows) == prompts * each
        assert set(Counter(row["score"] for row in rows).values()) == {len(rows) // 5}
        assert len({row["id"] for row in rows}) == len(rows)
        assert set(Counter(row["prompt_id"] for row in rows).values()) == {each}
        assert len({(row["prompt_id"], row["response"]) for row in rows}) == len(rows)
        assert len({(row["prompt_id"], row["instruction"]) for row in rows}) == prompts
    assert len(both["eval"]) >= 200


def test_evaluation_shares_no_category_prompt_or_item_with_training(both: dict[str, list[dict[str, Any]]]) -> None:
    for key in ("category", "prompt_id", "instruction", "id"):
        assert not {row[key] for row in both["train"]} & {row[key] for row in both["eval"]}
    items = {which: {i for row in rows for i in row["response"].split(", ")} for which, rows in both.items()}
    assert not items["train"] & items["eval"]


def test_categories_are_large_enough_and_share_no_item() -> None:
    train, held_out = synthetic.categories("train"), synthetic.categories("eval")
    assert len(train) >= 18 and 6 <= len(held_out) <= 8 and len(train) + len(held_out) >= 24
    items = [item for words in [*train.values(), *held_out.values()] for item in words]
    assert len(items) == len(set(items))
    assert min(len(words) for words in [*train.values(), *held_out.values()]) >= 14


def test_the_seed_alone_decides() -> None:
    assert synthetic.generate(20, 3, seed=5) == synthetic.generate(20, 3, seed=5)
    assert synthetic.generate(20, 3, seed=5) != synthetic.generate(20, 3, seed=6)


@pytest.mark.parametrize(
    ("prompts", "responses", "which"), [(0, 1, "all"), (81, 1, "eval"), (1, 0, "all"), (1, 1, "x")]
)
def test_impossible_sizes_are_errors(prompts: int, responses: int, which: str) -> None:
    with pytest.raises(ValueError, match=f"n_prompts is {prompts}|responses_per_prompt is 0|which is 'x'"):
        synthetic.generate(prompts, responses, seed=0, which=which)


def test_rows_are_short(both: dict[str, list[dict[str, Any]]], smollm2_tokenizer: Any) -> None:
    scale = ScoreScale.from_tokenizer(smollm2_tokenizer, [1, 2, 3, 4, 5], "So the overall score is ")
    builder = PromptBuilder(PromptConfig(template="short", system="Grade."), smollm2_tokenizer, scale)
    rows = [parse_row(row, "", scale, True) for row in both["train"] + both["eval"]]
    assert max(len(builder.ids(row)) for row in rows) <= 80
    lengths = [len(smollm2_tokenizer.encode(row.feedbacks[0])) for row in rows]
    assert max(lengths) <= 32 and sum(lengths) / len(lengths) < 24


def test_command_line(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    synthetic.main(["--output", str(path), "--prompts", "6", "--responses", "2", "--seed", "4", "--categories", "eval"])
    assert [json.loads(line) for line in path.read_text().splitlines()] == synthetic.generate(6, 2, 4, "eval")
    assert "12 rows of 6 prompts" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        synthetic.main(["--output", str(path), "--prompts", "1000"])
    assert "n_prompts is 1000" in capsys.readouterr().err
