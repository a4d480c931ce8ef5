"""Labels: a text of one token for every score, where the number itself has several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from real_fast.config import PromptConfig
from real_fast.data.rows import cut_score
from real_fast.errors import ScaleError
from real_fast.prompt.builder import PromptBuilder
from real_fast.score.phrase import PhraseFinder, parse_sample
from real_fast.score.protocol import read
from real_fast.score.scale import ScoreScale
from real_fast.types import JudgeTexts, Rollout
from tests.vocabularies import FAMILIES

EOS = frozenset({-1})
TEN = list(range(1, 11))
LETTERS = [f" {letter}" for letter in "ABCDEFGHIJ"]
WORDS = [" Bad", " Poor", " Fair", " Good", " Great"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("values", "phrase", "labels"),
    [(TEN, "Score:", LETTERS), ([1, 2, 3, 4, 5], "Verdict:", WORDS), ([1, 1.5, 2], "Score: ", ["0", "1", "2"])],
)
def test_what_is_written_by_label_is_read_as_a_number(
    family: str, values: list[float], phrase: str, labels: list[str], vocabulary: Callable[[str], Any]
) -> None:
    tokenizer = vocabulary(family)
    scale = ScoreScale.from_tokenizer(tokenizer, values[::-1], phrase, labels[::-1])
    assert scale.values == tuple(map(float, values)) and scale.texts == tuple(labels)
    finder = PhraseFinder(tokenizer, scale)
    for value, label in zip(values, labels, strict=True):
        ids = tokenizer.encode(f"Fine. {phrase}{label}\n", add_special_tokens=False)
        for answer in ("forced", "generated", "cut"):
            parsed = parse_sample(ids, EOS, finder, answer)
            assert parsed.written_score == value and parsed.has_score
            assert ids[parsed.score_position or -1] == scale.score_ids[values.index(value)]
        assert cut_score(f"Fine. {phrase}{label}.", scale) == "Fine."
    other = tokenizer.encode(f"Fine. {phrase}{labels[0]}est\n", add_special_tokens=False)
    assert parse_sample(other, EOS, finder, "generated").written_score is None


def test_predictions_keep_numbers_and_prompts_name_both(smollm2_tokenizer: Any) -> None:
    scale = ScoreScale.from_tokenizer(smollm2_tokenizer, TEN, "Score:", LETTERS)
    logprobs = [-1.0 if value == 9 else -50.0 for value in range(10)]
    found = read([Rollout([7], [-1.0], [7], 0, "phrase", logprobs, 10.0)], scale, "real", renormalize=True)
    assert found.prediction == pytest.approx(10.0) and found.distribution is not None
    assert list(found.distribution) == [str(value) for value in TEN]
    prompt = PromptBuilder(PromptConfig(), smollm2_tokenizer, scale).ids(JudgeTexts("i", "r", "u", ""))
    assert "A (for 1), B (for 2)" in smollm2_tokenizer.decode(prompt)


@pytest.mark.parametrize("labels", [["A"], ["A", " A"], ["A", " "], ["A", "B", "C"]])
def test_every_score_needs_a_label_of_its_own(smollm2_tokenizer: Any, labels: list[str]) -> None:
    with pytest.raises(ScaleError, match=r"every score needs a label of its own"):
        ScoreScale.from_tokenizer(smollm2_tokenizer, [1, 2], "Score:", labels)


def test_a_score_of_several_tokens_names_the_way_out(vocabulary: Callable[[str], Any]) -> None:
    with pytest.raises(ScaleError, match=r"score 10 is 2 tokens .*0 to 9.*--scale\.labels"):
        ScoreScale.from_tokenizer(vocabulary("qwen3"), TEN, "So the overall score is ")
    with pytest.raises(ScaleError, match=r"score Poor is 2 tokens|merges the end .*--scale\.labels"):
        ScoreScale.from_tokenizer(vocabulary("qwen3"), [1, 2], "Verdict: ", ["Poor", "Good"])
