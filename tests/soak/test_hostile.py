"""Hostile data, the fast part: examples by hypothesis, the fuzzer's corpus again, and how loading grows."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from real_fast.config import PromptConfig
from real_fast.config.yaml_file import read as read_yaml
from real_fast.data.dataset import load_rows
from real_fast.data.layouts import common
from real_fast.data.rows import parse_row
from real_fast.data.tables import table_records
from real_fast.errors import ConfigError, DataError, GradeError, RowError
from real_fast.judging.lines import grade_lines
from real_fast.prompt.builder import PromptBuilder
from real_fast.prompt.guard import Guard
from real_fast.runs import checkpoint
from real_fast.score.scale import ScoreScale
from tests.soak import hostile
from tests.soak.fuzz import CORPUS, NAMES, idle
from tests.soak.malformed import FIELDS, FILES, GOOD, LINES, MARKUP, answer
from tests.soak.resumed import READ
from tests.soak.targets import ENDINGS, Targets

TEXT = st.text() | st.lists(st.sampled_from(MARKUP) | st.text(max_size=3), max_size=5).map("".join)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3), max_leaves=8)
TURNS = st.lists(
    st.fixed_dictionaries({}, optional={k: VALUES for k in ("role", "content", "from", "value")}), max_size=3
)
RECORDS = st.dictionaries(st.sampled_from(FIELDS), VALUES | TURNS, max_size=6).map(lambda changed: GOOD | changed)


@pytest.fixture(scope="module")
def targets(smollm2: Path, smollm2_tokenizer: Any) -> Iterator[Targets]:
    made = Targets({"smollm2": smollm2_tokenizer}, smollm2)
    yield made
    made.close()


def line(record: Any) -> bytes:
    return json.dumps(record).encode() + b"\n"


@pytest.mark.parametrize("name", ["rows", "prompts", "lines"])
def test_any_record(name: str, targets: Targets) -> None:
    settings(max_examples=50)(given(RECORDS | VALUES)(lambda record: targets.by_name[name](line(record))))()


@pytest.mark.parametrize("name", ["rows", "lines", "answers", "verdicts", "config"])
def test_any_bytes(name: str, targets: Targets) -> None:
    settings(max_examples=30)(given(st.binary(max_size=200))(targets.by_name[name]))()


@pytest.mark.parametrize("name", ["readers", "resume"])
def test_any_bytes_of_any_kind_of_file(name: str, targets: Targets) -> None:
    kinds = st.integers(0, max(len(ENDINGS), len(READ)) - 1).map(lambda kind: bytes([kind]))
    contents = st.binary(max_size=100) | VALUES.map(line) | st.dictionaries(st.sampled_from(FIELDS), VALUES).map(line)
    settings(max_examples=50)(given(kinds, contents)(lambda kind, data: targets.by_name[name](kind + data)))()


def test_any_text_as_an_answer(targets: Targets) -> None:
    texts = st.lists(TEXT | st.sampled_from(("So the overall score is ", "[RESULT] ", "4", "\n> ", '"')), max_size=8)
    settings(max_examples=50)(given(texts.map("".join))(lambda text: targets.verdicts(text.encode(errors="replace"))))()


LOGPROBS = st.floats() | st.integers() | st.none() | TEXT | st.booleans()
LEGACY = st.fixed_dictionaries(
    {
        "tokens": st.just(["Fine. ", "So the overall score is", " ", "4"]) | VALUES,
        "token_logprobs": st.lists(LOGPROBS, min_size=4, max_size=4) | VALUES,
        "top_logprobs": st.lists(
            st.dictionaries(st.sampled_from("12345"), LOGPROBS) | st.none(), min_size=4, max_size=4
        ),
    }
)


def test_any_answer_of_a_server(targets: Targets) -> None:
    answers = st.lists(LEGACY | VALUES, max_size=2).map(lambda some: {"choices": [{"logprobs": one} for one in some]})
    settings(max_examples=50)(given(answers)(lambda value: targets.answers(line(value))))()


@pytest.mark.parametrize("kind", [*LINES, *FILES, "answers"])
def test_every_kind_that_the_soak_tries(kind: str, targets: Targets) -> None:
    watch = hostile.Watch()
    for seed in range(1 if kind in hostile.RARE else 2):
        rng = Random(seed)
        if kind in LINES:
            data, reads = LINES[kind](rng), [targets.rows, targets.prompts, targets.verdicts, targets.lines]
        elif kind in FILES:
            endings, make = FILES[kind]
            data = make(rng)
            reads = [lambda data, ending=ending: targets.file(ending, data) for ending in endings]
        else:
            data, reads = answer(rng), [targets.answers]
        problem = watch.problem(f"{kind} {seed}", data, reads)
        assert problem is None, problem


@pytest.mark.parametrize("name", NAMES)
def test_what_the_fuzzer_found(name: str, targets: Targets) -> None:
    files = sorted((CORPUS / name).glob("*"))
    assert files, f"no corpus for {name}"
    for file in files:
        targets.by_name[name](file.read_bytes())


def never_mind(data: bytes) -> None:
    """A reader that takes every exception for its data's."""
    while True:
        with suppress(Exception):
            time.sleep(1)


def test_a_fault_is_seen(targets: Targets, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each limit of the soak, and each check of what comes out, can fail."""
    watch = hostile.Watch()

    def problem(read: Callable[[bytes], Any]) -> str:
        return watch.problem("it", b"0123456789", [read]) or ""

    monkeypatch.setattr(hostile, "SECONDS", 0.001)
    assert " s for 10 bytes" in problem(lambda data: sum(range(300_000)))
    monkeypatch.setattr(hostile, "SECONDS", 60.0)
    assert " MB for 10 bytes" in problem(lambda data: len(bytes(17_000_000)))
    assert "KeyError" in problem(lambda data: {}["a"])
    monkeypatch.setattr(hostile, "CLOCK", 0.05)
    for stuck in (lambda data: time.sleep(2), lambda data: [None for _ in iter(int, 1)], never_mind):
        assert "not done after 0.05 s by the clock for 10 bytes: b'0123456789'" in problem(stuck)
    assert hostile.too_steep("it", {"10": 1.0, "100": 14.9}) is None
    assert (
        hostile.too_steep("it", {"10": 1.0, "100": 15.1}) == "it: 1.0 s and 15.1 s of the processor for 10 and 100 rows"
    )
    assert hostile.too_steep("it", {"10": 0.01, "100": 0.9}) is None
    monkeypatch.setattr("tests.soak.targets.grade_lines", lambda *args: list(grade_lines(*args))[1:])
    assert "0 lines for 1" in problem(targets.lines)


def test_a_fuzzer_that_tries_nothing_is_a_loss() -> None:
    tried = "stat::number_of_executed_units: "
    assert idle(False, 0, f"{tried}12\n") is None and idle(True, 77, "") is None
    assert idle(False, 0, f"{tried}0\n") == idle(False, 0, "") == "the fuzzer tried nothing"
    assert idle(False, 1, f"{tried}12\n") == "the fuzzer ended with status 1"


# Faults that were found


def test_a_mapped_field_that_a_prometheus_record_lacks(scale: ScoreScale) -> None:
    record = {"orig_response": "An apple.", "instruction": "x", "score": 4}
    with pytest.raises(RowError, match="instruction is missing"):
        parse_row(record, "r", scale, False, {"instruction": "question.text"})


@pytest.mark.parametrize("text", [f"[0x{'f' * 5000}]", "[" + "INST][" * 100_000 + "]", f"[{'-' * 3000}1]"])
def test_a_list_as_text_that_python_cannot_write_back(text: str) -> None:
    assert common(GOOD | {"feedback": text}, {}, "")["feedback"] == text


@pytest.mark.parametrize(
    ("logprob", "says"),
    [(5.0, "above 0"), ("-1", "is a number"), (True, "is a number"), (-(10**400), "no log-probabilities")],
)
def test_a_log_probability_that_is_none(logprob: Any, says: str, targets: Targets) -> None:
    tokens = ["So the overall score is", " ", "4"]
    legacy = {"tokens": tokens, "token_logprobs": [-1, -1, logprob], "top_logprobs": [None] * 3}
    with pytest.raises(GradeError, match=says):
        targets.served.grade({"choices": [{"logprobs": legacy}]})
    likely = [None, None, {str(k): -0.1 for k in range(1, 6)}]
    with pytest.raises(GradeError, match=r"add up to 4\.5"):
        targets.served.grade(
            {"choices": [{"logprobs": legacy | {"token_logprobs": [-1, -1, -0.1], "top_logprobs": likely}}]}
        )


DOUBLED = list(pairwise("abcdefghijklmnop"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: " + "[" * 1000, "nested too deep"),
        ("a: &a {x: 1, y: 2}\n" + "".join(f"{c}: &{c} {{x: *{p}, y: *{p}}}\n" for p, c in DOUBLED), "its aliases"),
    ],
)  # fmt: skip
def test_settings_that_grow_when_they_are_read(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_yaml(tmp_path / "c.yaml")


def test_a_state_of_other_types_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "step-000001").mkdir()
    (tmp_path / "step-000001" / "trainer_state.json").write_text('{"step": "one", "scheduler": []}')
    with pytest.raises(Exception, match=r"step is 'one'"):
        checkpoint.newest(tmp_path)


# Loading grows as the data does: calls of functions are counted, and no time is taken


def calls(function: Callable[[], Any]) -> int:
    """Calls of Python's and of C's functions."""
    count = 0

    def called(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(called)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def steps(function: Callable[[], Any]) -> int:
    """Instructions of Python's in the functions of real_fast."""
    count = 0

    def step(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if "real_fast" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "own ids": lambda i: GOOD | {"id": str(i), "instruction": f"Name fruit {i}."},
    "equal ids": lambda i: GOOD,
    "ids like those that are given to equal ones": lambda i: GOOD | {"id": f"a-{i % 7}"},
    "refused": lambda i: {"id": "a", "score": 9},
}


@pytest.mark.parametrize("kind", ROWS)
def test_loading_is_linear_in_rows(kind: str, targets: Targets, tmp_path: Path) -> None:
    builder = targets.builders[0]

    def load(rows: int) -> int:
        (tmp_path / "rows.jsonl").write_bytes(b"".join(line(ROWS[kind](i)) for i in range(rows)))
        source = str(tmp_path / "rows.jsonl")
        return calls(lambda: load_rows(source, "train", builder, targets.scale, 2048, []))

    load(10)  # what is made once
    few, many = load(100), load(400)
    assert many < 4.2 * few, f"{few} calls for 100 rows, {many} for 400"


@pytest.mark.parametrize(
    "filled", ["word ", "So the overall score is 4 ", "[INST] ", "<think></think>", '"a" ', "\n> "]
)
def test_loading_is_linear_in_bytes(filled: str, targets: Targets, vocabulary: Any) -> None:
    """Python's own steps: what loops within a line counts too, what C's functions copy does not."""
    guard = Guard(vocabulary("mistral"), {})

    def work(repeated: int) -> int:
        text = filled * repeated
        raters = {"scores": [4] * repeated, "feedbacks": [filled] * repeated, "feedback": None}
        turns = [{"role": ("user", "assistant")[i % 2], "content": filled} for i in range(repeated | 1)]

        def all_of_it() -> None:
            parse_row(GOOD | {"response": text, "feedback": text}, "r", targets.scale, False)
            parse_row(GOOD | raters, "r", targets.scale, False)
            parse_row({"messages": turns, "score": 4}, "r", targets.scale, False)
            guard.shown("".join(guard.data(filled) for _ in range(repeated)))
            targets.verdicts(text.encode())

        return steps(all_of_it)

    work(10)
    few, many = work(50), work(200)
    assert many < 4.3 * few, f"{few} steps for 50, {many} for 200"


def test_what_is_far_too_long_is_not_encoded(targets: Targets, smollm2_tokenizer: Any) -> None:
    builder = PromptBuilder(PromptConfig(template="short"), smollm2_tokenizer, targets.scale)
    seen: list[int] = []

    class Counted:
        def __call__(self, text: str, **kwargs: Any) -> Any:
            seen.append(len(text))
            return smollm2_tokenizer(text, **kwargs)

    row = parse_row(GOOD | {"response": "word " * 200_000}, "r", targets.scale, False)
    prompt = builder.marked(row)
    builder.tokenizer = Counted()
    with pytest.raises(RowError, match=r"prompt is too long: over 4096 tokens, prompt\.max_tokens is 2048"):
        builder.check_length(prompt, 2048)
    assert seen == [16 * 2048]
    builder.check_length(prompt, 10**6)
    assert len(seen) == 1


@pytest.mark.parametrize("head", ['sep="\na,b\n1,2', "sep=\r\na\n1", 'sep=""\n'])
def test_excels_line_names_a_mark_that_can_separate(head: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(head.encode())
    with (tmp_path / "t.csv").open("rb") as file:
        try:
            list(table_records(file, tmp_path / "t.csv", False))
        except DataError as error:
            assert "t.csv" in str(error)
