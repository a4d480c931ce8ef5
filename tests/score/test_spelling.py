"""Texts of ids and places of marks, beside the slow ways to them."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from real_fast.score.spelling import Spelling
from real_fast.score.verdict import _scan
from tests.score.plain_scan import plain_scan
from tests.vocabularies import FAMILIES

TEXTS = (
    "Fine. So the overall score is 4",
    "Ça va – très bien! 👍🏽 ok",
    "<think>\n\n</think> é",
    "日本語 и так далее",
    "",
)


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("family", [*FAMILIES, "smollm2"])
def test_texts_are_the_tokenizers_own(family: str, vocabulary: Callable[[str], Any], smollm2_tokenizer: Any) -> None:
    tokenizer = smollm2_tokenizer if family == "smollm2" else vocabulary(family)
    spelling, draw = Spelling(tokenizer), Random(0)
    assert (spelling._pieces is None) == (family == "mistral")  # SentencePiece's spaces depend on the place
    written = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    known = sorted(tokenizer.get_vocab().values())
    added = sorted(tokenizer.get_added_vocab().values())
    for n in range(400):
        ids = [draw.choice(known) for _ in range(draw.randrange(12))]  # many of them no whole characters
        ids += written[n % len(TEXTS)] + [draw.choice(added)] * draw.randrange(2)
        if n % 2:
            ids = ids[draw.randrange(len(ids) + 1) :]
        text = decoded(tokenizer, ids)
        assert spelling.text(ids) == text
        for part in (text[: draw.randrange(len(text) + 1)], text + "?", "other"):
            fewest = [m for m in range(len(ids)) if decoded(tokenizer, ids[:m]).startswith(part)]
            want = fewest[0] if fewest else len(ids)
            assert spelling.shortest(ids, part) == (want, decoded(tokenizer, ids[:want]) == part)


PIECES = (
    "   ",
    " >",
    "So the score is",
    "\n",
    ">",
    " ",
    "\t",
    "<think>",
    "</think>",
    "[THINK]",
    "[/THINK]",
    '"',
    "'",
    "`",
    "“",
    "”",
    "a",
    "",
)


@given(
    text=st.lists(st.sampled_from(PIECES), max_size=30).map("".join),
    phrase=st.sampled_from(("So the score is", "Score:", "[RESULT]", '"a', "a")),
    thought=st.sampled_from(("", "</think>", "[/THINK]")),
)
def test_marks_are_found_where_one_expression_finds_them(text: str, phrase: str, thought: str) -> None:
    assert _scan(text, phrase, thought) == plain_scan(text, phrase, thought)
