"""The layouts that judge data is published in, people's own names, and what a data frame's row can hold."""

from __future__ import annotations

import json
import re
from collections import namedtuple
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from real_fast.config import PromptConfig
from real_fast.data.dataset import Rejected, load_rows, write_rejected
from real_fast.data.layouts import check_fields
from real_fast.data.rows import cut_score, parse_row, parse_texts, row_key
from real_fast.data.values import MAX_DEPTH, plain, too_deep
from real_fast.errors import ConfigError, RowError
from real_fast.prompt.builder import PromptBuilder
from real_fast.score.scale import ScoreScale
from real_fast.types import JudgeRow

GOOD: dict[str, Any] = {"instruction": "Name a fruit.", "response": "apple", "rubric": "Is it one?", "score": 4}
PROMPT = """###Task Description:
An instruction, a response to evaluate, a reference answer and a score rubric are given.

###The instruction to evaluate:
Name a fruit.

###Response to evaluate:
apple
###Score Rubrics: quoted

###Reference Answer (Score 5):
pear

###Score Rubrics:
[Is it one?]
Score 1: no
Score 5: yes

###Feedback: """
PARTS = ("Name a fruit.", "apple\n###Score Rubrics: quoted", "[Is it one?]\nScore 1: no\nScore 5: yes", "pear")
ASKED = " Please think step by step and then output the final score with 'So the overall score is (score)'"
USER = {"role": "user", "content": "Name a fruit."}
ASSISTANT = {"role": "assistant", "content": "apple"}
MISSING = [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT, np.datetime64("NaT"), Decimal("NaN"), ""]


@pytest.fixture(scope="module")
def scale(smollm2_tokenizer: Any) -> ScoreScale:
    return ScoreScale.from_tokenizer(smollm2_tokenizer, [1, 2, 3, 4, 5], "So the overall score is ")


@pytest.fixture
def one(scale: ScoreScale) -> Any:
    """Parses a record."""

    def parse(record: Any, fields: dict[str, str] | None = None) -> JudgeRow:
        return parse_row(record, "file:1", scale, True, fields)

    return parse


def texts(row: JudgeRow) -> tuple[str, str, str, str]:
    return row.instruction, row.response, row.rubric, row.reference_answer


# Published layouts


def test_prometheus_evals_own_files(one: Any) -> None:
    record = {
        "idx": 1,
        "category": "generic",
        "instruction": PROMPT,
        "gpt4_score": [5, 4, 4],
        "gpt4_feedback": ["a", "b", "c"],
    }
    row = one(record)
    assert texts(row) == PARTS
    assert (row.label, row.feedbacks, row.feedback_labels) == (pytest.approx(13 / 3), ["a", "b", "c"], [5, 4, 4])
    flask = one(record | {"criteria": "logic", "human_score": [1, 2]})  # two labels: GPT-4's are the papers'
    assert flask.label == pytest.approx(13 / 3) and flask.rubric == PARTS[2]
    assert one(record | {"human_score": [1, 2]}, {"scores": "human_score"}).label == 1.5
    assert one(record | {"gpt4_score": 2, "gpt4_feedback": "a"}).label == 2
    assert one(record | {"gpt4_score": "[1, 2]"}).label == 1.5  # a list in a CSV cell


def test_the_published_vicuna_rows(scale: ScoreScale, smollm2_tokenizer: Any, judge_data: Path) -> None:
    path = judge_data / "raw" / "prometheus_eval_vicuna.json"
    rejected: list[Rejected] = []
    builder = PromptBuilder(PromptConfig(template="short"), smollm2_tokenizer, scale)
    rows = load_rows(str(path), "", builder, scale, 8192, rejected)
    assert len(rows) == 6 and not rejected  # all were rejected: their response stands inside the instruction
    for row, record in zip(rows, json.loads(path.read_text()), strict=True):
        assert row.label == pytest.approx(sum(record["gpt4_score"]) / 3) and len(row.feedbacks) == 3
        assert row.rubric.startswith("[") and "\nScore 5: " in row.rubric and row.reference_answer
        between = record["instruction"]
        for part in (*texts(row)[:2], row.reference_answer, row.rubric):
            before, found, between = between.partition(part)
            assert found and "###" in before
        assert between.strip() == "###Feedback:"


def test_a_whole_prometheus_prompt_with_its_verdict(one: Any) -> None:
    row = one({"instruction": PROMPT, "output": "Feedback: It is one. [RESULT] 4"})
    assert texts(row) == PARTS and (row.label, row.feedbacks) == (4.0, ["It is one."])


@pytest.mark.parametrize("label", ["4", 4, 4.0])
def test_verls_parquet_as_the_real_authors_write_it(label: Any, one: Any) -> None:
    content = PROMPT + ASKED
    record = {
        "data_source": "prometheus-eval/Feedback-Collection",
        "prompt": np.array([{"role": "user", "content": content}]),  # as pandas reads Parquet
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": label},
        "extra_info": {"split": "train", "index": 7, "question": "?", "answer": "It is one. So the overall score is 4"},
    }
    row = one(record)
    assert row.messages == [{"role": "user", "content": content}]  # word for word
    assert (row.label, row.feedbacks, row.instruction) == (4.0, ["It is one."], "Name a fruit.")
    # Dataset.map keeps the columns of the source beside its own.
    kept = record | {"orig_instruction": "Name a fruit.", "orig_response": "pear", "orig_feedback": "x", "output": "y"}
    assert one(kept).messages == row.messages and one(kept).feedbacks == ["It is one."]
    tests = record | {"extra_info": {"index": 7, "gpt4_feedback": "Fine.", "original_scores": [4, 4]}}
    assert one(tests).feedbacks == ["Fine."]
    unlike = record | {"extra_info": {"answer": "72"}}  # the answer of a mathematics set is no feedback
    assert one(unlike).feedbacks == [] and one(record | {"extra_info": None}).label == 4.0


def test_a_ready_made_prompt_is_tokenized_as_it_is(scale: ScoreScale, smollm2_tokenizer: Any, tmp_path: Path) -> None:
    builder = PromptBuilder(PromptConfig(template="judge"), smollm2_tokenizer, scale)
    messages = [{"role": "system", "content": "Be strict."}, USER]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": messages, "score": 3}))
    (row,) = load_rows(str(path), "", builder, scale, 999, [])
    chat = smollm2_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert row.prompt_ids == smollm2_tokenizer(chat, add_special_tokens=False).input_ids


def test_chats(one: Any) -> None:
    rubric = {"rubric": "u", "score": 3}
    assert one({"messages": [USER], "score": 3}).messages == [USER]
    graded = one({"messages": [USER, ASSISTANT], **rubric})
    assert texts(graded)[:3] == ("Name a fruit.", "apple", "u") and not graded.messages
    long = one({"messages": [{"role": "system", "content": "s"}, USER, ASSISTANT, USER, ASSISTANT], **rubric})
    assert long.instruction == "System: s\n\nUser: Name a fruit.\n\nAssistant: apple\n\nUser: Name a fruit."
    trl = {"prompt": [USER], "completion": [ASSISTANT], **rubric}
    assert texts(one(trl)) == texts(graded) == texts(one({"prompt": [USER], "response": "apple", **rubric}))
    sharegpt = {
        "conversations": [{"from": "human", "value": "Name a fruit."}, {"from": "gpt", "value": "apple"}],
        **rubric,
    }
    assert texts(one(sharegpt)) == texts(graded)
    parts = [{"role": "user", "content": [{"type": "text", "text": "Name "}, {"type": "text", "text": "a fruit."}]}]
    assert one({"messages": parts, "score": 3}).messages == [USER]
    sft = one({"messages": [USER, {"role": "assistant", "content": "It is one. [RESULT] 4"}]})
    assert (sft.messages, sft.label, sft.feedbacks) == ([USER], 4.0, ["It is one."])
    assert parse_texts({"messages": [USER]}, needs_rubric=True).messages == [USER]
    for empty in (None, float("nan"), pd.NA, [], "hello", {"a": 1}):
        assert texts(one(GOOD | {"messages": empty})) == texts(one(GOOD))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": ["a"]}, "a message is not an object: str"),
        ({"messages": [{"role": "user"}]}, "a message has no role or no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a message holds more than text"),
        ({"messages": [{"role": "system", "content": "s"}]}, "messages has no message of the user's at its end"),
        ({"messages": [USER, ASSISTANT], "response": "pear"}, "two responses"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "is not valid Unicode"),
    ],
)
def test_chats_that_cannot_be_used(record: dict[str, Any], message: str, one: Any) -> None:
    with pytest.raises(RowError, match=message):
        one({"rubric": "u", "score": 3} | record)


def test_alpaca_and_questions_with_answers(one: Any) -> None:
    alpaca = {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day", "rubric": "u", "score": 3}
    assert texts(one(alpaca))[:2] == ("Translate.\n\nGuten Tag", "Good day")
    assert texts(one(alpaca | {"input": ""}))[:2] == texts(one(alpaca | {"input": float("nan")}))[:2]
    assert one(alpaca | {"input": ""}).instruction == "Translate."
    assert texts(one({"question": "q", "answer": "a", "rubric": "u", "score": 3}))[:2] == ("q", "a")
    both = one(GOOD | {"question": "q", "answer": "a"})  # further fields, as before
    assert texts(both) == texts(one(GOOD))


def test_verls_prompt_is_the_judges_whatever_it_ends_with(one: Any) -> None:
    begun = {"role": "assistant", "content": "Feedback:"}
    verl = {"prompt": [USER, begun], "reward_model": {"ground_truth": "4"}, "response": "of a rollout"}
    row = one(verl)
    assert (row.messages, row.instruction, row.response, row.label) == ([USER, begun], USER["content"], "", 4)


# People's own names


def test_fields_map_names(one: Any) -> None:
    record = {
        "q": "i",
        "out": {"text": "r", "a.b": "x"},
        "ratings": {"overall": "3"},
        "how": {"criteria": "c", "1": "bad"},
    }
    fields = {"instruction": "q", "response": "out.text", "score": "ratings.overall", "rubric": "how"}
    row = one(record, fields)
    assert (*texts(row)[:3], row.label) == ("i", "r", "[c]\nScore 1: bad", 3.0)
    assert one(GOOD | {"a.b": "dotted"}, {"response": "a.b"}).response == "dotted"
    # The mapped field alone counts, whatever else the record has under our names.
    prometheus = {"orig_instruction": "i", "orig_response": "r", "orig_criteria": "c", "orig_score": 2, "output": "v"}
    other = one(prometheus | {"human": 5, "how": "u"}, {"score": "human", "rubric": "how", "response": "output"})
    assert (*texts(other)[:3], other.label) == ("i", "v", "u", 5.0)
    assert one(GOOD | {"who": 7, "topic": "t"}, {"id": "who", "prompt_id": "topic"}).prompt_id == "t"
    with pytest.raises(
        RowError, match=r"label is missing: there is none of .* among its fields: instruction, response"
    ):
        one(GOOD, {"score": "rating"})


def test_fields_that_map_what_no_row_has() -> None:
    with pytest.raises(ConfigError, match=r"data\.fields has 'reponse': it maps instruction, response, "):
        check_fields({"reponse": "answer"})
    with pytest.raises(ConfigError, match=r"data\.fields\.response is ''"):
        check_fields({"response": ""})


def test_a_missing_field_says_which_there_are(one: Any) -> None:
    with pytest.raises(
        RowError, match=r"response is missing: .* among its fields: prompt_text, answer_a, instruction$"
    ):
        one({"prompt_text": "i", "answer_a": "r"}, {"instruction": "prompt_text"})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (GOOD | {"response": " "}, "response is empty: the field response"),
        (GOOD | {"score": None}, "label is empty: the field score"),
        (GOOD | {"rubric": {"criteria": ""}}, "rubric is empty: the field rubric; the template uses it"),
        ({"orig_instruction": "i", "response": "r"}, "response is missing: there is none of orig_response, "),
        (GOOD | {"score": [4, 5]}, r"label is not a number: '[4, 5]' (data.fields.scores takes a list, each rater's)"),
    ],
)
def test_a_field_that_is_there_is_not_said_to_be_missing(one: Any, record: Any, reason: str) -> None:
    with pytest.raises(RowError, match=f"^{re.escape(reason)}"):
        one(record)


@pytest.mark.parametrize("write", [json.dumps, repr], ids=["json", "python"])
def test_lists_and_records_in_a_cell_of_text(one: Any, write: Any) -> None:
    row = one({"instruction": PROMPT, "gpt4_score": write([5, 4]), "gpt4_feedback": write(["It's one.", 'So "so".'])})
    assert row.label == 4.5 and row.feedbacks == ["It's one.", 'So "so".'] and row.feedback_labels == [5, 4]
    verl = {"prompt": [USER], "reward_model": {"ground_truth": "4"}, "extra_info": {"gpt4_feedback": "Fine."}}
    assert one({name: write(value) for name, value in verl.items()}) == one(verl)
    chat = {"messages": [USER, ASSISTANT], "rubric": {"criteria": "Is it one?", "score1_description": "no"}}
    assert one({"score": 3, **{name: write(value) for name, value in chat.items()}}) == one({"score": 3, **chat})
    assert one(GOOD | {"feedback": write(["a", "b"])}).feedbacks == ["a", "b"]


def test_text_that_only_looks_like_a_list_stays_text(one: Any) -> None:
    for name in ("instruction", "response", "rubric"):
        for text in ("[1, 2]", '{"a": 1}', "[]", "{x}", "{{}}", "{[]: 1}", "[" * 500):
            assert getattr(one(GOOD | {name: text}), name) == text
    for text in ("[1, 2]", '[{"a": 1}]'):
        assert one({**GOOD, "prompt": text, "instruction": None}).instruction == text
    assert one(GOOD | {"feedback": "[RESULT] is missing"}).feedbacks == ["[RESULT] is missing"]
    with pytest.raises(RowError, match=r"gpt4_feedback is a list written as text that cannot be read back"):
        one({"instruction": PROMPT, "gpt4_score": 4, "gpt4_feedback": "['a' 'b']"})  # NumPy's, in two texts
    with pytest.raises(RowError, match=r"prompt is a list written as text that cannot be read back"):
        one({"prompt": f"[{USER}\n {ASSISTANT}]", "response": "a", "rubric": "u", "score": 3})


def test_a_label_that_stands_for_a_score_is_one_in_data(smollm2_tokenizer: Any) -> None:
    words = ScoreScale.from_tokenizer(smollm2_tokenizer, [1, 2, 3], "Verdict:", [" Poor", " Fair", " Good"])
    assert parse_row(GOOD | {"score": "Good"}, "id", words, True).label == 3
    told = parse_row({"messages": [USER, {**ASSISTANT, "content": "It is. Verdict: Fair"}]}, "id", words, True)
    assert (told.label, told.messages, told.feedbacks) == (2, [USER], ["It is."])
    halves = ScoreScale.from_tokenizer(smollm2_tokenizer, [1, 1.5, 2], "Score: ", ["0", "1", "2"])
    assert parse_row(GOOD | {"score": "2"}, "id", halves, True).label == 2  # data keeps its numbers
    with pytest.raises(RowError, match=r"label is not a number: 'Best'"):
        parse_row(GOOD | {"score": "Best"}, "id", words, True)


# What a data frame's row can hold


@pytest.mark.parametrize("missing", MISSING, ids=lambda m: f"{type(m).__name__}")
def test_a_missing_value_is_as_good_as_no_field(missing: Any, one: Any) -> None:
    optional = ("id", "prompt_id", "reference_answer", "feedback", "feedbacks", "scores", "orig_response", "orig_score")
    more = ("orig_criteria", "score1_description", "label", "messages", "gpt4_score", "reward_model", "extra_info", "x")
    row = one(GOOD | dict.fromkeys((*optional, *more), missing))
    assert row == one(GOOD)
    scores = {"feedbacks": ["a", missing, "c"], "scores": [2, missing, 5], "score": missing}
    if not isinstance(missing, str):
        given = one(GOOD | scores)
        assert (given.label, given.feedbacks, given.feedback_labels) == (3.5, ["a", "c"], [2.0, 5.0])
    for required in ("instruction", "response", "rubric", "score"):
        with pytest.raises(RowError, match=" is empty: the field "):
            one(GOOD | {required: missing})


def test_values_of_numpy_and_pandas(one: Any) -> None:
    raters = {"feedbacks": np.array(["a", "b"], dtype=object), "scores": np.array([3, 5]), "score": None}
    row = one(GOOD | raters)
    assert (row.label, row.feedback_labels) == (4.0, [3.0, 5.0])
    for score in (np.int64(4), np.float32(4), np.str_("4"), Decimal(4)):
        assert one(GOOD | {"score": score}).label == 4.0
    assert one(GOOD | {"id": np.int64(7), "prompt_id": 8.0}).id == "7"
    assert one(GOOD | {"prompt_id": 8.0}).prompt_id == "8"
    for odd in (np.array(["a", "b"]), pd.Timestamp("2020-01-01"), pd.Timedelta(1), b"x", {"a": 1}, np.longdouble(2)):
        assert one(GOOD | {"unrelated": odd}) == one(GOOD)
        with pytest.raises(RowError, match="response is not text"):
            one(GOOD | {"response": odd})


def test_rows_of_a_data_frame(one: Any) -> None:
    frame = pd.DataFrame([GOOD | {"id": 7}, {k: v for k, v in GOOD.items() if k != "reference_answer"}])
    expected = [one(GOOD | {"id": "7"}), one(GOOD)]
    assert [one(row) for row in frame.to_dict("records")] == expected
    assert [one(row) for _, row in frame.iterrows()] == expected
    assert [one(row) for row in frame.itertuples(index=False)] == expected
    assert [one(row) for row in frame.convert_dtypes().to_dict("records")] == expected
    Pair = namedtuple("Pair", "a b")
    for other in (Pair(1, 2), frame["id"], [1], "text", None, 5):
        with pytest.raises(RowError):
            one(other)


def deep(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = {"a": [value]} if levels % 2 else [value]
    return value


@pytest.mark.parametrize("levels", [10, 70, 300, 480, 900, 3000])
def test_nesting(levels: int, one: Any, tmp_path: Path) -> None:
    assert one(GOOD | {"unrelated": deep(levels)}) == one(GOOD)
    for name in ("response", "scores", "rubric", "messages", "feedback", "id", "extra_info", "reward_model"):
        try:
            one({k: v for k, v in GOOD.items() if k != "score"} | {name: deep(levels)})
        except RowError as error:
            reason = str(error)
            assert reason
    write_rejected(tmp_path / "r.jsonl", [Rejected("s", 1, "i", "r", {"a": deep(levels), "b": float("nan")})])
    written = json.loads((tmp_path / "r.jsonl").read_text())["row"]
    assert written["b"] == "nan" and written["a"]


@pytest.mark.parametrize("levels", [30, 64, 65, 400, 100_000])
def test_how_deep_json_is_nested(levels: int) -> None:
    text = '{"a": "' + "[" * 200 + r"\"]\\" + '", "b": ' + "[" * (levels - 1) + "]" * (levels - 1) + "}"
    assert too_deep(text) == (levels > MAX_DEPTH)


def test_what_plain_leaves_alone() -> None:
    assert plain({"a": (1, np.array([[1.5, np.nan]]))}) == {"a": [1, [[1.5, None]]]}
    assert plain(np.longdouble(2)) == 2


def test_further_fields_for_a_template(scale: ScoreScale) -> None:
    record = GOOD | {"topic": "fruit", "n": float("nan"), "extra": {"level": np.int64(3)}}
    extra = parse_row(record, "a", scale, True, needs_extra=True).extra
    assert (extra["topic"], extra["n"], extra["level"], extra["response"]) == ("fruit", None, 3, "apple")
    assert parse_texts(record, True, needs_extra=True).extra == extra and not parse_texts(record, True).extra


# Verdicts and keys


def test_a_verdict_is_cut_in_linear_time(scale: ScoreScale) -> None:
    assert cut_score("Good. [RESULT]" + "\n" * 100_000 + "4 \n. ", scale) == "Good."
    text = "Good. So the overall score is" + " \n" * 100_000 + "x"
    assert cut_score(text, scale) == text
    assert cut_score("İ" * 9 + " [RESULT] 4", scale) == "İ" * 9  # a letter whose lower case is two


def test_the_same_row_has_the_same_key_whatever_it_comes_in(one: Any) -> None:
    first = row_key(one(GOOD))
    assert first == row_key(one(GOOD | {"id": "x", "score": 2, "response": "apple\r\n"})) == "2c95e44445d0a652"
    others = [GOOD | {name: "other"} for name in ("instruction", "response", "rubric", "reference_answer")]
    keys = {first, *(row_key(one(r)) for r in others), row_key(one({"messages": [USER], "score": 1}))}
    assert len(keys) == 6
