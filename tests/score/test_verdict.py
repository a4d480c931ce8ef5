"""The verdict: found whatever tokens spell it, outside thoughts and quotations, and no longer number than it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from real_fast.score.phrase import PhraseFinder, parse_sample
from real_fast.score.scale import ScoreScale
from real_fast.score.verdict import phrases_outside, thought_left_open, written_behind
from real_fast.types import AnswerMode
from tests.vocabularies import FAMILIES

PHRASE = "So the overall score is "
EOS = frozenset({-1})

HEADS = ("Score", "So the overall score is", "[RESULT]", "**Verdict", "\nScore", "Final:\nscore", "<score", '"score')
ENDINGS = ("\n", ":\n", ": ", ":", " ", "=", "\t", ":\t", "\n\n", ": \n", ":  ", "** ", ">", '": ', ") ", ". ", "](\n")
FEEDBACKS = ("Fine.", "It isn't good: 3 of 5 points.", "Ça va – très bien!", "", 'A 5" screen; see `x`', "- one\n- two")


def respelled(tokenizer: Any, vocabulary: dict[str, int], ids: list[int], choose: Callable[[int], int]) -> list[int]:
    """The same text in other tokens: some are split in two, some are merged with the one behind them."""
    pieces: list[str] = list(tokenizer.convert_ids_to_tokens(ids))
    at = 0
    while at < len(pieces):
        piece, what = pieces[at], choose(3)
        cuts = [c for c in range(1, len(piece)) if piece[:c] in vocabulary and piece[c:] in vocabulary]
        if what == 1 and cuts and not (piece.startswith("<") and piece.endswith(">")):
            cut = cuts[choose(len(cuts))]
            pieces[at : at + 1] = [piece[:cut], piece[cut:]]
        elif what == 2 and at + 1 < len(pieces) and piece + pieces[at + 1] in vocabulary:
            pieces[at : at + 2] = [piece + pieces[at + 1]]
        at += 1
    return [vocabulary[piece] for piece in pieces]


@pytest.mark.parametrize("family", [*FAMILIES, "smollm2"])
def test_what_is_written_is_found_whatever_the_tokens(
    family: str, vocabulary: Callable[[str], Any], smollm2_tokenizer: Any
) -> None:
    tokenizer = smollm2_tokenizer if family == "smollm2" else vocabulary(family)
    known = tokenizer.get_vocab()
    scale_of = cache(lambda phrase: ScoreScale.from_tokenizer(tokenizer, [1, 2, 3, 4, 5], phrase))

    @examples(max_examples=50)
    @given(st.data())
    def found(data: st.DataObject) -> None:
        phrase = data.draw(st.sampled_from(HEADS)) + data.draw(st.sampled_from(ENDINGS))
        scale = scale_of(phrase)
        finder = PhraseFinder(tokenizer, scale)
        feedback, score = data.draw(st.sampled_from(FEEDBACKS)), data.draw(st.integers(1, 5))
        between, behind = (
            data.draw(st.sampled_from(("", " ", "\n", "\n\n"))),
            data.draw(st.sampled_from(("", "\n", ". "))),
        )
        text = f"{feedback}{between}{phrase}{score}{behind}"
        canonical = tokenizer.encode(text, add_special_tokens=False)
        ids = respelled(tokenizer, known, canonical, lambda n: data.draw(st.integers(0, n - 1)))
        assume(finder.decode(ids) == finder.decode(canonical))

        for answer in ("forced", "cut"):
            parsed = parse_sample(ids, EOS, finder, answer)
            assert parsed.finish == "phrase" and parsed.written_score == score
            assert finder.decode(parsed.context_ids).endswith(phrase.lstrip())
            if parsed.score_position is not None:
                assert ids[: parsed.score_position] == parsed.context_ids
            # Sampled tokens, but for the last: it may be one that runs on behind the phrase.
            acted = max(0, parsed.num_actions - 1)
            assert parsed.context_ids[:acted] == ids[:acted]
        assert parse_sample(ids, EOS, finder, "generated").written_score == score
        canonically = parse_sample(canonical, EOS, finder, "generated")
        assert canonically.has_score and canonically.score_position is not None
        assert canonical[canonically.score_position] == scale.score_ids[score - 1]
        # Token by token, as an engine looks: it stops, and what it stops with says the same.
        start = finder.before(ids)
        stop = next((t for t in range(start, len(ids) + 1) if finder.settled(ids[:t], "forced")), None)
        assert (stop is None) == (not behind)
        if stop is not None:
            assert parse_sample(ids[:stop], EOS, finder, "forced") == parse_sample(ids, EOS, finder, "forced")

    found()


@pytest.mark.parametrize("phrase", ["Score:\n", "[RESULT]\n", "So the overall score is:\n\n"])
@pytest.mark.parametrize("family", ["qwen3", "llama3", "deepseek"])
def test_a_token_with_the_phrases_end_and_its_line_break(
    family: str, phrase: str, vocabulary: Callable[[str], Any]
) -> None:
    tokenizer = vocabulary(family)
    scale = ScoreScale.from_tokenizer(tokenizer, [1, 2, 3, 4, 5], phrase)
    finder = PhraseFinder(tokenizer, scale)
    assert scale.tail_ids == () and scale.held == phrase[len(phrase.rstrip()) :]

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    own = parse_sample(ids(f"Fine. {phrase}4"), EOS, finder, "forced")
    assert own.context_ids == ids("Fine.") + list(scale.phrase_ids) and own.n_forced == 0
    assert (own.score_position, own.written_score) == (len(own.context_ids), 4.0)
    # Colon and line break apart are the same text, and stay as they were sampled.
    head, space = phrase.rstrip(), phrase[len(phrase.rstrip()) :]
    apart = [*ids(f"Fine. {head}"), *ids(space), *ids("4")]
    assert parse_sample(apart, EOS, finder, "forced").context_ids == apart[:-1]
    # Without the break, the phrase's own token takes the colon's place; the colon was sampled, and counts as an action.
    missing = parse_sample([*ids(f"Fine. {head}"), *ids("4")], EOS, finder, "forced")
    assert missing.context_ids == own.context_ids and missing.num_actions == len(ids(f"Fine. {head}"))
    assert missing.n_forced == 1 and missing.score_position is None and missing.written_score is None


def test_another_break_behind_the_phrase_than_its_space(vocabulary: Callable[[str], Any]) -> None:
    """ "]" and a line break are one token: it completes the phrase, runs on, and gives way to the phrase's own."""
    tokenizer = vocabulary("qwen3")
    scale = ScoreScale.from_tokenizer(tokenizer, [1, 2, 3, 4, 5], "[RESULT] ")
    finder = PhraseFinder(tokenizer, scale)
    ids = tokenizer.encode("Fine. [RESULT]\n4", add_special_tokens=False)
    parsed = parse_sample(ids, EOS, finder, "forced")
    assert tokenizer.decode(parsed.context_ids) == "Fine. [RESULT] " and parsed.finish == "phrase"
    assert parsed.num_actions == len(ids) - 1 and finder.settled(ids[:-1], "forced")


# What is no verdict


def verdicts(text: str, thought: str = "") -> list[str]:
    """What follows each phrase that may be a verdict."""
    found = [place.at for place in phrases_outside(text, PHRASE.strip(), thought)[0]]
    return [text[at + len(PHRASE) : at + len(PHRASE) + 1] for at in found]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"Fine. {PHRASE}4", "4"),
        (f"<think>Perhaps {PHRASE}5, no.</think>\nFine. {PHRASE}2", "2"),
        (f"\n<think>\n{PHRASE}5\n\n{PHRASE}4\n</think>{PHRASE}2", "2"),
        (f"[THINK]{PHRASE}5[/THINK] {PHRASE}2", "2"),
        (f"<think>{PHRASE}5", ""),
        (f"Hm. <think>{PHRASE}5</think> {PHRASE}2", "2"),
        (f"The <think> section is good. {PHRASE}4", "4"),
        (f'It was to end in "{PHRASE}5". {PHRASE}2', "2"),
        (f"It ends in “… {PHRASE}5”, in «{PHRASE}5» and in `{PHRASE}5`. {PHRASE}2", "2"),
        (f"It says '{PHRASE}5', and isn't right. {PHRASE}2", "2"),
        (f"> {PHRASE}5\n\n{PHRASE}2", "2"),
        (f'A 5" screen. {PHRASE}4', "4"),
        (f"The writers' work isn't bad. {PHRASE}4", "4"),
        (f'He said "fine.\n{PHRASE}4', "4"),
        (f'He said "fine. {PHRASE}4', "4"),
        (f'**{PHRASE}4**, and "good"', "4"),
        (f"{PHRASE}3. But then: {PHRASE}4", "34"),
    ],
)
def test_thoughts_and_quotations(text: str, found: str) -> None:
    assert "".join(verdicts(text)) == found


def test_the_prompt_may_open_the_thought(vocabulary: Callable[[str], Any], finder: PhraseFinder) -> None:
    tokenizer = vocabulary("deepseek")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Grade."}], add_generation_prompt=True)
    ids = ids if isinstance(ids, list) else ids["input_ids"]
    scale = ScoreScale.from_tokenizer(tokenizer, [1, 2, 3, 4, 5], PHRASE)
    thought = PhraseFinder(tokenizer, scale).thought(ids)
    assert thought == "</think>"
    text = f"Maybe {PHRASE}5.\n</think>\n\nFine. {PHRASE}2"
    assert verdicts(text, thought) == ["2"] and verdicts(text[:30], thought) == []
    assert (
        thought_left_open("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        == ""
        == thought_left_open("Grade <think> it.")
    )
    assert finder.thought([]) == ""


@pytest.mark.parametrize("family", [*FAMILIES, "smollm2"])
@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("", "<think>\nIt is good, so"),
        ("", f"<think>\nIs {PHRASE}5 right? Yes"),
        ("Grade it.\n<think>\n", "It is good, so"),
        ("Grade it.\n<think>\n", ""),
        ("", "[THINK]It is good"),
        ("", "Good.\n<think>\nIt is never closed"),
        ("", "It is good, so"),
    ],
)
def test_what_is_appended_is_an_answer_and_no_thought(
    family: str, prompt: str, text: str, vocabulary: Callable[[str], Any], smollm2_tokenizer: Any
) -> None:
    """Where a thought was cut off, by max_tokens or the end of the text, it is closed first."""
    tokenizer = smollm2_tokenizer if family == "smollm2" else vocabulary(family)
    scale = ScoreScale.from_tokenizer(tokenizer, [1, 2, 3, 4, 5], PHRASE)
    finder = PhraseFinder(tokenizer, scale)
    thought = finder.thought(tokenizer.encode(prompt, add_special_tokens=False))
    assert thought == ("</think>" if prompt else "")
    sampled = tokenizer.encode(text, add_special_tokens=False)
    in_thought = bool(prompt) or text.startswith(("<think>", "[THINK]"))
    close = "\n[/THINK]\n\n" if text.startswith("[THINK]") else "\n</think>\n\n"
    modes: list[AnswerMode] = ["forced", "cut"] if text else ["forced", "cut", "none"]
    for answer in modes:
        for ids in (sampled, [*sampled, -1]):
            parsed = parse_sample(ids, EOS, finder, answer, thought)
            written = finder.decode(parsed.context_ids)
            assert list(finder.places(parsed.context_ids, written, thought))
            assert written.endswith(close + " " + PHRASE) == in_thought and parsed.has_score
            assert parsed.n_forced == len(parsed.context_ids) - len(sampled) <= scale.most_appended
            assert tuple(parsed.context_ids[-len(scale.phrase_ids) :]) == scale.phrase_ids
            assert parsed.context_ids[: len(sampled)] == sampled


@pytest.mark.parametrize(
    ("rest", "score", "sure"),
    [
        (" 4", 4, False),
        (" 4\n", 4, True),
        (" 4.", 4, False),
        (" 4. It", 4, True),
        (" 4/5", 4, True),
        (" 4**", 4, True),
        (" 4.5", None, True),
        (" 4,5", None, True),
        (" 3-4", None, True),
        (" 45", None, True),
        (" 4th", None, True),
        (" 10", None, True),
        (" 1", 1, False),
        ("", None, False),
        (" ", None, False),
        (": 4", None, True),
        ("\n4", None, True),
        (" good", None, True),
    ],
)
def test_longer_numbers_are_not_the_score(rest: str, score: int | None, sure: bool) -> None:
    found = written_behind(rest, 0, " ", ("1", "2", "3", "4", "5"))
    assert (None if found.score is None else found.score + 1, found.sure) == (score, sure)


def test_scores_that_begin_alike_are_told_apart() -> None:
    texts = ("1", "2", "10")
    assert written_behind(" 10", 0, " ", texts).score == 2 and not written_behind(" 10", 0, " ", texts).sure
    assert written_behind(" 1", 0, " ", texts).score == 0 and written_behind(" 12", 0, " ", texts).score is None


@pytest.mark.parametrize("text", ["score is 10", "score is 4.5", "score is 45 of 50"])
def test_a_longer_number_is_no_written_score(smollm2_tokenizer: Any, finder: PhraseFinder, text: str) -> None:
    ids = smollm2_tokenizer.encode(f"Fine. So the overall {text}")
    assert parse_sample(ids, EOS, finder, "forced").written_score is None
    assert parse_sample(ids, EOS, finder, "cut").written_score is None
    generated = parse_sample(ids, EOS, finder, "generated")
    assert generated.written_score is None and not generated.has_score


def test_the_last_verdict_of_a_whole_text_counts(smollm2_tokenizer: Any, finder: PhraseFinder) -> None:
    ids = smollm2_tokenizer.encode(f"<think>{PHRASE}5</think> {PHRASE}3. No, '{PHRASE}1' is wrong: {PHRASE}4\n")
    parsed = parse_sample(ids, EOS, finder, "generated")
    assert parsed.written_score == 4.0 and parsed.has_score
    # An answer whose phrase is put where it lacks ends with its first verdict.
    forced = parse_sample(ids, EOS, finder, "forced")
    assert smollm2_tokenizer.decode(forced.context_ids) == f"<think>{PHRASE}5</think> {PHRASE}"
    assert forced.written_score == 3.0
