from __future__ import annotations

import bz2
import copy
import csv
import gzip
import io
import json
import lzma
import random
import re
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from real_fast.config import Config, DataConfig, PromptConfig
from real_fast.data.dataset import (
    Rejected,
    check_enough_rows,
    first_of_each,
    load_rows,
    load_train_eval,
    reason_counts,
    write_rejected,
)
from real_fast.data.rows import cut_score, parse_texts
from real_fast.data.sources import Source, benchmarks, sources
from real_fast.data.splits import limit_by_prompt, split_by_prompt
from real_fast.data.values import number
from real_fast.errors import DataError
from real_fast.prompt.builder import PromptBuilder
from real_fast.score.scale import ScoreScale
from real_fast.types import JudgeRow

GOOD: dict[str, Any] = {"instruction": "Name a fruit.", "response": "apple", "rubric": "Is it one?", "score": 4}
PROMETHEUS: dict[str, Any] = {
    "instruction": "###Task Description: everything at once",
    "output": "Feedback: fine. [RESULT] 4",
    "orig_instruction": "Name a fruit.",
    "orig_response": "apple",
    "orig_reference_answer": "pear",
    "orig_criteria": "Is it a fruit?",
    "orig_feedback": "An apple is one.",
    "orig_score": "4",
} | {f"orig_score{k}_description": f"level {k}" for k in range(5, 0, -1)}


@pytest.fixture(scope="module")
def scale(smollm2_tokenizer: Any) -> ScoreScale:
    return ScoreScale.from_tokenizer(smollm2_tokenizer, [1, 2, 3, 4, 5], "So the overall score is ")


@pytest.fixture(scope="module")
def builder(smollm2_tokenizer: Any, scale: ScoreScale) -> PromptBuilder:
    return PromptBuilder(PromptConfig(template="short"), smollm2_tokenizer, scale)


class Loader:
    """Writes records to a file and loads them."""

    def __init__(self, folder: Path, builder: PromptBuilder, scale: ScoreScale) -> None:
        self.folder, self.builder, self.scale = folder, builder, scale
        self.rejected: list[Rejected] = []

    def source(self, source: str | Path, max_tokens: int = 2048, split: str = "train") -> list[JudgeRow]:
        return load_rows(str(source), split, self.builder, self.scale, max_tokens, self.rejected)

    def write(self, *records: Any, name: str = "rows.jsonl") -> Path:
        path = self.folder / name
        path.write_bytes(b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in records))
        return path

    def one(self, record: Any) -> JudgeRow:
        rows = self.source(self.write(record))
        assert not self.rejected, self.rejected
        return rows[0]


@pytest.fixture
def loader(tmp_path: Path, builder: PromptBuilder, scale: ScoreScale) -> Loader:
    return Loader(tmp_path, builder, scale)


def row(row_id: str, prompt_id: str) -> JudgeRow:
    return JudgeRow(row_id, prompt_id, f"instruction {prompt_id}", "response", "rubric", "", 3.0, [], [])


# Fields


def test_prometheus_fields_win_over_the_plain_ones(loader: Loader) -> None:
    loaded = loader.one(PROMETHEUS)
    assert (loaded.instruction, loaded.response, loaded.reference_answer) == ("Name a fruit.", "apple", "pear")
    assert loaded.rubric.splitlines() == ["[Is it a fruit?]", *(f"Score {k}: level {k}" for k in range(1, 6))]
    assert (loaded.label, loaded.feedbacks, loaded.feedback_labels) == (4.0, ["An apple is one."], [4.0])
    assert "Task Description" not in loader.builder.text(loaded)


def test_a_prometheus_record_without_a_response_does_not_take_the_verdict_for_one(loader: Loader) -> None:
    assert loader.source(loader.write({k: v for k, v in PROMETHEUS.items() if k != "orig_response"})) == []
    assert loader.rejected[0].reason.startswith("response is missing")


@pytest.mark.parametrize("instruction", ["instruction", "prompt", "input"])
@pytest.mark.parametrize("response", ["response", "output", "completion"])
@pytest.mark.parametrize(
    ("rubric", "reference", "score"),
    [("rubric", "reference_answer", "score"), ("criteria", "reference", "label"), ("score_rubric", "x", "human_score")],
)
def test_aliases(instruction: str, response: str, rubric: str, reference: str, score: str, loader: Loader) -> None:
    loaded = loader.one({instruction: "i", response: "r", rubric: "u", reference: "f", score: " 3.5 "})
    assert (loaded.instruction, loaded.response, loaded.rubric, loaded.label) == ("i", "r", "u", 3.5)
    assert loaded.reference_answer == ("" if reference == "x" else "f")


@pytest.mark.parametrize(
    "rubric",
    [
        {
            "rubric": {
                "criteria": "c",
                "score2_description": "two",
                "score1_description": "one",
                "score3_description": None,
            }
        },
        {"rubric": {"criteria": "c", "1": "one", "2": "two"}},
        {"criteria": "c", "score1_description": "one", "score2_description": "two"},
    ],
)
def test_a_rubric_in_parts(rubric: dict[str, Any], loader: Loader) -> None:
    record = {k: v for k, v in GOOD.items() if k != "rubric"}
    assert loader.one(record | rubric).rubric == "[c]\nScore 1: one\nScore 2: two"


def test_feedbacks_have_their_raters_labels(loader: Loader) -> None:
    both = {"feedbacks": ["low [RESULT] 3", "", "high"], "scores": [3, 4, "5"]}
    loaded = loader.one(GOOD | both)
    assert (loaded.feedbacks, loaded.feedback_labels, loaded.label) == (["low", "high"], [3.0, 5.0], 4.0)
    assert loader.one({k: v for k, v in GOOD.items() if k != "score"} | both).label == 4.0
    assert loader.one(GOOD | {"feedbacks": ["a", "b"]}).feedback_labels == [4.0, 4.0]
    assert loader.one(GOOD | {"feedback": "a", "scores": [3, 5]}).feedback_labels == [4.0]
    assert loader.one(GOOD | {"feedback": None}).feedbacks == []
    # A rater who gave no score leaves the mean to the others, and the row's label to the feedback.
    some = {k: v for k, v in GOOD.items() if k != "score"} | {"feedbacks": ["a", "b", "c"], "scores": [2, None, 5]}
    loaded = loader.one(some)
    assert (loaded.label, loaded.feedback_labels) == (3.5, [2.0, 3.5, 5.0])


def test_one_number_under_two_names_in_two_spellings(loader: Loader) -> None:
    assert loader.one(GOOD | {"score": 4, "label": "4.0"}).label == 4.0
    empty = {k: v for k, v in GOOD.items() if k != "score"} | {"orig_score": "", "scores": [3, 4]}
    assert loader.one(empty).label == 3.5


def test_keys_that_are_no_text_are_passed_over(loader: Loader) -> None:
    assert parse_texts({**GOOD, 1: "x"}, needs_rubric=True).instruction == GOOD["instruction"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Good. So the overall score is 4", "Good."),
        ("Good. so the overall score is: 4.5.", "Good."),
        ("Good.\n[RESULT] 4\n", "Good."),
        ("Good. [RESULT] Score: 1.", "Good."),
        ("Good. [RESULT]", "Good."),
        ("[RESULT] 4", ""),
        ("Good. So the overall score is 4/5", "Good."),
        ("Good. So the overall score is **4** out of 5.", "Good."),
        ("Good. So the overall score is **4.5/5**.", "Good."),
        ("Good. So the overall score is 4 of the worst.", "Good. So the overall score is 4 of the worst."),
        ("A score of 4", "A score of 4"),
        ("[RESULT] 4 comes first, then this.", "[RESULT] 4 comes first, then this."),
    ],
)
def test_a_verdict_at_the_end_of_a_feedback_is_cut(text: str, kept: str, scale: ScoreScale) -> None:
    assert cut_score(text, scale) == kept


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (4, 4.0),
        ("4", 4.0),
        (" 3.5\n", 3.5),
        (Decimal("3.5"), 3.5),
        *((bad, None) for bad in (True, "", "four", "nan", "inf", "1_0", None, [4], 10**400)),
        *((bad, None) for bad in (float("nan"), float("inf"))),
    ],
)
def test_numbers(value: Any, expected: float | None) -> None:
    assert number(value) == expected


def test_ids(loader: Loader) -> None:
    records = [GOOD, GOOD | {"id": "a"}, GOOD | {"id": "a"}, GOOD | {"id": "a-2"}, GOOD | {"id": 7, "prompt_id": 8}]
    rows = loader.source(loader.write(*records))
    assert [r.id for r in rows] == ["rows.jsonl:1", "a", "a-2", "a-2-2", "7"]
    assert rows[4].prompt_id == "8"
    other = loader.one(GOOD | {"instruction": "Name  a\nfruit. "})
    assert (
        rows[0].prompt_id == rows[1].prompt_id == other.prompt_id != loader.one(GOOD | {"instruction": "b"}).prompt_id
    )
    assert rows[0].prompt_id == "ae53951fa695da1b"  # the same on every machine and in every process


def test_prompts_are_encoded(loader: Loader) -> None:
    loaded = loader.one(GOOD)
    assert loaded.prompt_ids == loader.builder.ids(loaded) and len(loaded.prompt_ids) > 20


# Rejections


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"score": True}, "label is not a number: 'True'"),
        ({"score": "four"}, "label is not a number: 'four'"),
        ({"score": float("nan")}, "label is empty: the field score"),
        ({"score": "inf"}, "label is not a number: 'inf'"),
        ({"score": [4]}, "label is not a number: '[4]'"),
        ({"score": None}, "label is empty: the field score"),
        ({"score": 6}, "label is off the scale: 6 is not within 1 to 5"),
        ({"score": "0.5"}, "label is off the scale: 0.5 is not within 1 to 5"),
        ({"scores": [None, None], "score": None}, "label is missing: no rater gave a score"),
        ({"label": 2}, "two fields for the score: score and label differ"),
        ({"instruction": None}, "instruction is empty"),
        ({"instruction": " \n"}, "instruction is empty"),
        ({"instruction": ["a"]}, "instruction is not text: list"),
        ({"instruction": "\ud800"}, "instruction is not valid Unicode"),
        ({"response": ""}, "response is empty"),
        ({"response": 5}, "response is not text: int"),
        ({"rubric": None}, "rubric is empty"),
        ({"rubric": {"criteria": None}}, "rubric is empty"),
        ({"rubric": {"criteria": "c", "weight": "2"}}, "rubric has an unknown key: 'weight'"),
        ({"rubric": 5}, "rubric is not text: int"),
        ({"reference": {"a": 1}}, "reference_answer is not text: dict"),
        ({"feedback": 3}, "feedback is not text: int"),
        ({"feedbacks": ["a"], "scores": ["x"]}, "a rater's score is not a number: 'x'"),
        ({"response": "word " * 300}, "prompt is too long: "),
    ],
)
def test_records_that_cannot_be_used(change: dict[str, Any], reason: str, loader: Loader) -> None:
    rows = loader.source(loader.write(GOOD, GOOD | {"id": "bad"} | change, GOOD), max_tokens=200)
    assert [r.id for r in rows] == ["rows.jsonl:1", "rows.jsonl:3"]
    (one,) = loader.rejected
    assert one.reason.startswith(reason)
    assert (one.line, one.id, Path(one.source).name) == (2, "bad", "rows.jsonl")
    write_rejected(loader.folder / "rejected.jsonl", loader.rejected)
    text = (loader.folder / "rejected.jsonl").read_text()
    written = json.loads(text, parse_constant=pytest.fail)
    assert written["reason"] == one.reason
    if change.get("score") == change.get("score"):  # all but NaN
        assert written["row"] == GOOD | {"id": "bad"} | change


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{oops\n", "not JSON: .* of line 2"),
        (b"[" * 100_000 + b"\n", "not JSON: .* line 2"),
        (b'{"score": ' + b"9" * 5000 + b"}\n", "not JSON: .* line 2"),
        (b'{"a": "\xff"}\n', "not UTF-8: .* line 2"),
        (b"[1, 2]\n", "not an object: list"),
        (b'"text"\n', "not an object: str"),
    ],
)
def test_lines_that_are_no_records(line: bytes, reason: str, loader: Loader) -> None:
    assert len(loader.source(loader.write(GOOD, line, b"\n", GOOD))) == 2
    (one,) = loader.rejected
    assert one.line == 2 and one.id == "rows.jsonl:2"
    assert re.match(reason, one.reason)
    write_rejected(loader.folder / "rejected.jsonl", loader.rejected)
    assert json.loads((loader.folder / "rejected.jsonl").read_text())["line"] == 2


def test_the_limit_itself_is_not_too_long(loader: Loader) -> None:
    path = loader.write(GOOD)
    length = len(loader.source(path)[0].prompt_ids)
    assert len(loader.source(path, max_tokens=length)) == 1 and not loader.rejected
    assert loader.source(path, max_tokens=length - 1) == []
    assert loader.rejected[0].reason.endswith(f"{length} tokens, prompt.max_tokens is {length - 1}")


def test_a_rubric_is_needed_only_where_the_template_uses_it(
    loader: Loader, smollm2_tokenizer: Any, scale: ScoreScale
) -> None:
    template = loader.folder / "plain.txt"
    template.write_text("{instruction}: {response}")
    loader.builder = PromptBuilder(PromptConfig(template=str(template)), smollm2_tokenizer, scale)
    assert loader.one({"instruction": "i", "response": "r", "score": 1}).rubric == ""


def test_a_template_that_fails_on_a_record_rejects_it(
    loader: Loader, smollm2_tokenizer: Any, scale: ScoreScale
) -> None:
    template = loader.folder / "strict.jinja"
    template.write_text("{{ response }}{{ 1 // (response | length - 5) }}")
    loader.builder = PromptBuilder(PromptConfig(template=str(template)), smollm2_tokenizer, scale)
    assert loader.source(loader.write(GOOD)) == []
    assert "ZeroDivisionError" in loader.rejected[0].reason


def test_too_few_rows_is_an_error_that_counts_the_reasons(loader: Loader) -> None:
    path = loader.write(GOOD, GOOD | {"score": 9}, GOOD | {"score": 7, "id": "x"}, b"oops\n")
    rows = loader.source(path)
    check_enough_rows(rows, 1, str(path), loader.rejected)
    assert reason_counts(loader.rejected) == {"label is off the scale": 2, "not JSON": 1}
    with pytest.raises(DataError, match=r"1 usable rows, and at least 2 .* 2 rejected: label is off .*jsonl:2: 9 is"):
        check_enough_rows(rows, 2, str(path), loader.rejected)
    rows = loader.source(path := loader.write(GOOD | {"id": "\ud800"}, GOOD | {"score": "\ud800"}))
    with pytest.raises(DataError, match=r"1 rejected: id is not valid Unicode \(first \\ud800:") as caught:
        check_enough_rows(rows, 1, str(path), loader.rejected)
    str(caught.value).encode()  # a terminal must be able to show it
    with pytest.raises(DataError, match=r"0 usable rows.*none was rejected"):
        check_enough_rows([], 1, "empty.jsonl", loader.rejected)


# Sources


def test_kinds_of_files(loader: Loader) -> None:
    import pyarrow
    import pyarrow.parquet

    records = [GOOD | {"id": str(i), "score": float(i)} for i in range(1, 4)]
    lines = "".join(json.dumps(r) + "\n" for r in records).encode()
    files = {"a.jsonl": b"\xef\xbb\xbf" + lines, "a.JSON": json.dumps(records).encode()}
    files |= {"a.jsonl.gz": gzip.compress(lines), "a.json.gz": gzip.compress(files["a.JSON"])}
    files |= {"a.jsonl.bz2": bz2.compress(lines), "a.ndjson.xz": lzma.compress(lines), "b.jsonl": gzip.compress(lines)}
    files |= {"crlf.jsonl": lines.replace(b"\n", b"\r\n"), "utf16.jsonl": lines.decode().encode("utf-16")}
    files |= {"list.jsonl": files["a.JSON"], "list2.jsonl": json.dumps(records, indent=1).encode(), "lines.json": lines}
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, [*records[0], ""])
    writer.writeheader()
    writer.writerows([r | {"instruction": 'Name, "a"\r\nfruit.'} for r in records])
    text = table.getvalue()
    files |= {
        "a.csv": text.encode("utf-8-sig"),
        "a.csv.gz": gzip.compress(text.encode()),
        "b.csv": text.encode("utf-16"),
    }
    files |= {"a.tsv": text.replace(",", "\t").encode(), "semicolons.csv": text.replace(",", ";").encode()}
    for name, data in files.items():
        (loader.folder / name).write_bytes(data)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), loader.folder / "a.parquet")
    (loader.folder / "parquet.jsonl").write_bytes((loader.folder / "a.parquet").read_bytes())
    for name in [*files, "a.parquet", "parquet.jsonl"]:
        rows = loader.source(loader.folder / name)
        assert [(r.id, r.label) for r in rows] == [("1", 1.0), ("2", 2.0), ("3", 3.0)], name
    assert not loader.rejected


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 99, mtime=0)[:20], "cannot be read"),
        ("a.json.gz", b"no gzip", "cannot be read"),
        ("a.parquet", b"no parquet", "cannot be read as Parquet"),
        ("a.json", b'{"instruction": 1}', "holds one dict with the keys instruction, and a list .*orient='records'"),
        ("a.json", b'[{}, {"a": }]', "is not JSON .*named .jsonl"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.json", b'[{"a": "\xff"}]', "is not UTF-8: .* at byte 8"),
        ("a.txt", b"a,b\n", "files end in .jsonl.*and this one in .txt"),
        ("a.csv", b"a,b,a\n1,2,3\n", "two columns 'a'"),
        ("a.csv", b"", "is empty: it has no header"),
        ("a.csv", b'a,b\n1,2\n"3,4\n', "is not CSV: unexpected end of data in the row that begins in line 3"),
        ("a.csv", b"a,b\nM\xfcller,2\n", "is not UTF-8 .*0xfc.*save it as UTF-8"),
        ("a.csv", b"PK\x03\x04rest", "is a zip archive or an Excel workbook"),
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "is a Git LFS pointer .*git lfs pull",
        ),
        ("a.jsonl", b"\n<!DOCTYPE html><html>", "is a web page"),
        ("a.jsonl", b"\xff\xfe\x00\xd8", "begins like UTF-16 and is not"),
        ("a.jsonl.xz", b"no xz", "cannot be read"),
        ("a.jsonl.bz2", b"no bz2", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read(name: str, data: bytes, message: str, loader: Loader) -> None:
    (loader.folder / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        loader.source(loader.folder / name)


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/missing/rows.parquet", "data/missing.json", "rows"])
def test_missing_files_say_what_was_looked_for(name: str, loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(loader.folder)
    with pytest.raises(DataError, match=f"no such file .looked for {(loader.folder / name)}"):
        loader.source(name)


def test_a_folder_is_no_source(loader: Loader) -> None:
    with pytest.raises(DataError, match="is a folder"):
        loader.source(loader.folder)


def test_hub_datasets(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> Any:
        asked.append((name, split))
        if name == "owner/gone":
            raise ConnectionError("no network")
        return datasets.Dataset.from_list([PROMETHEUS, PROMETHEUS | {"orig_score": "9"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (loaded,) = loader.source("owner/Feedback-v1.5", split="part")
    assert (loaded.label, loaded.id) == (4.0, "Feedback-v1.5:1")
    assert [(r.line, r.source) for r in loader.rejected] == [(2, "owner/Feedback-v1.5")]
    assert asked == [("owner/Feedback-v1.5", "part")]
    with pytest.raises(
        DataError, match=r"owner/gone: there is no such file .*split 'test' .*ConnectionError: no network"
    ):
        loader.source("owner/gone", split="test")


def test_synthetic_sources(loader: Loader) -> None:
    train, held_out = loader.source("synthetic:train"), loader.source("synthetic:eval")
    assert (len(train), len(held_out), loader.rejected) == (2000, 240, [])
    assert not {r.prompt_id for r in train} & {r.prompt_id for r in held_out}
    assert all(len(r.feedbacks) == 1 for r in train)
    with pytest.raises(DataError, match="synthetic:test: there is"):
        loader.source("synthetic:test")


@pytest.mark.parametrize("name", ["vicuna", "mt_bench"])
def test_real_rows(name: str, loader: Loader, judge_data: Path) -> None:
    rows = loader.source(judge_data / f"{name}.jsonl", max_tokens=8192)
    assert len(rows) == 240 and not loader.rejected
    assert Counter(Counter(r.prompt_id for r in rows).values()) == {4: 60}
    assert all(len(r.feedbacks) == len(r.feedback_labels) == 3 for r in rows)
    assert any(not r.label.is_integer() for r in rows)
    assert all(abs(sum(r.feedback_labels) / 3 - r.label) < 0.01 for r in rows)
    assert not any("[RESULT]" in text for r in rows for text in r.feedbacks)


def test_the_rows_of_a_table_that_do_not_fit_its_header(loader: Loader) -> None:
    path = loader.folder / "a.csv"
    path.write_text('instruction,response,rubric,score\n"i\n2",r,u,3\n\nr,u,3\ni,r,u,3,4\ni,r,u,5\n')
    assert [(r.id, r.label) for r in loader.source(path)] == [("a.csv:2", 3.0), ("a.csv:7", 5.0)]
    assert [(r.line, r.reason, r.row) for r in loader.rejected] == [
        (5, "not a row of the table: 3 cells in line 5, the header has 4", "r,u,3"),
        (6, "not a row of the table: 5 cells in line 6, the header has 4", "i,r,u,3,4"),
    ]
    (loader.folder / "header.csv").write_text("instruction,response,rubric,score\n")
    assert loader.source(loader.folder / "header.csv") == []


def test_parquet_with_two_columns_of_one_name(loader: Loader) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["score", "score"])
    pyarrow.parquet.write_table(table, loader.folder / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: has two columns 'score'"):
        loader.source(loader.folder / "a.parquet")


def test_several_files_and_patterns(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(loader.folder)
    for name in ("b", "a", "c[1]"):
        loader.write(GOOD | {"id": "x", "response": name}, name=f"{name}.jsonl")
    assert [(r.id, r.response) for r in loader.source("[ab].jsonl")] == [("x", "a"), ("x-2", "b")]
    assert [r.response for r in loader.source("**/*.jsonl")] == ["a", "b", "c[1]"]
    assert [r.response for r in loader.source("c[1].jsonl")] == ["c[1]"]  # a file of that very name comes first
    rows = load_rows(
        ["b.jsonl", {"path": "a.jsonl", "fields": {"response": "id"}}], "", loader.builder, loader.scale, 99, []
    )
    assert [r.response for r in rows] == ["b", "x"]
    with pytest.raises(DataError, match=r"d\*\.jsonl: no file matches"):
        loader.source("d*.jsonl")


@pytest.mark.parametrize("setting", [[], {}, 5, {"path": ""}, {"path": "a", "splitt": "b"}, [["a"], None]])
def test_settings_that_name_no_source(setting: Any) -> None:
    with pytest.raises(DataError, match=r"names no source|has no path|has 'splitt'"):
        sources(setting, Source(""))


def test_loading_takes_time_in_proportion(loader: Loader) -> None:
    """To equal ids, to brackets in a text, to white space in a feedback: each was worse than linear, or could be."""
    same = [GOOD | {"id": "x"}] * 3000
    deep = GOOD | {"rubric": "[" * 100_000 + "{" * 100_000 + '\\"' * 50_000, "id": "deep"}
    blank = GOOD | {"feedback": "Good. [RESULT]" + "\n" * 100_000 + "x", "id": "blank"}
    start = time.process_time()
    rows = loader.source(loader.write(*same, deep, blank), max_tokens=10**9)
    assert time.process_time() - start < 10  # 3,000 equal ids alone took 9 million tries
    assert len({r.id for r in rows}) == len(rows) == 3002


# Splits and limits


groups = st.dictionaries(st.text(min_size=1, max_size=4), st.integers(1, 4), min_size=2, max_size=12)


def rows_of(sizes: dict[str, int]) -> list[JudgeRow]:
    return [row(f"{prompt}/{i}", prompt) for prompt, n in sizes.items() for i in range(n)]


@given(sizes=groups, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 99), order=st.randoms(use_true_random=False))
def test_a_split_keeps_prompts_whole_whatever_the_order(
    sizes: dict[str, int], fraction: float, seed: int, order: random.Random
) -> None:
    rows = rows_of(sizes)
    train, held_out = split_by_prompt(rows, fraction, seed)
    assert train and held_out
    assert sorted(r.id for r in train + held_out) == sorted(r.id for r in rows)
    prompts = {r.prompt_id for r in held_out}
    assert not prompts & {r.prompt_id for r in train}
    assert abs(len(prompts) - fraction * len(sizes)) <= 1
    shuffled = order.sample(rows, len(rows))
    again = split_by_prompt(shuffled, fraction, seed)
    assert {r.id for r in again[1]} == {r.id for r in held_out}
    assert again[0] == [r for r in shuffled if r in train]


def test_another_seed_holds_out_other_prompts() -> None:
    rows = rows_of({str(i): 1 for i in range(40)})
    assert split_by_prompt(rows, 0.5, 0) == split_by_prompt(rows, 0.5, 0) != split_by_prompt(rows, 0.5, 1)


def test_one_prompt_cannot_be_split() -> None:
    with pytest.raises(DataError, match=r"3 rows of 1 prompt cannot be split .*data\.eval"):
        split_by_prompt(rows_of({"a": 3}), 0.5, 0)


@given(sizes=groups, n=st.integers(1, 30), seed=st.integers(0, 9), order=st.randoms(use_true_random=False))
def test_a_limit_keeps_prompts_whole(sizes: dict[str, int], n: int, seed: int, order: random.Random) -> None:
    rows = rows_of(sizes)
    if n < min(sizes.values()):
        with pytest.raises(DataError, match=f"limit of {n} rows"):
            limit_by_prompt(rows, n, seed)
        return
    kept = limit_by_prompt(rows, n, seed)
    counts = Counter(r.prompt_id for r in kept)
    assert 0 < len(kept) <= n and all(sizes[p] == count for p, count in counts.items())
    assert all(len(kept) + size > n for p, size in sizes.items() if p not in counts)
    assert kept == [r for r in rows if r in kept]
    shuffled = order.sample(rows, len(rows))
    assert {r.id for r in limit_by_prompt(shuffled, n, seed)} == {r.id for r in kept}


def test_no_limit() -> None:
    rows = rows_of({"a": 2, "b": 1})
    assert limit_by_prompt(rows, 0, 0) == rows == limit_by_prompt(rows, 3, 0)


# A run's data


def load(config, loader):
    """As a run of REAL loads its rows."""
    needed = config.rollout.prompts_per_step
    limit = config.prompt.max_tokens
    return load_train_eval(config.data, limit, loader.builder, loader.scale, needed, "rollout.prompts_per_step")


def config_of(train: Path | str, **data: Any) -> Config:
    config = Config()
    config.data.train = str(train)
    for key, value in data.items():
        setattr(config.data, key, value)
    config.rollout.prompts_per_step = 2
    return config


def prompts(*names: str) -> list[dict[str, Any]]:
    return [GOOD | {"instruction": name, "response": answer} for name in names for answer in ("a", "b")]


def test_part_of_the_prompts_is_held_out_whatever_the_seed_of_the_run(loader: Loader) -> None:
    config = config_of(loader.write(*prompts("w", "x", "y", "z"), {}), eval_fraction=0.5)
    data = load(config, loader)
    assert (len(data.train), len(data.eval), len(data.rejected), data.overlap) == (4, 4, 1, 0)
    config.seed = 5
    assert load(config, loader) == data


def test_separate_files_report_shared_prompts(loader: Loader) -> None:
    train = loader.write(*prompts("w", "x", "y"), name="train.jsonl")
    held_out = loader.write(*[r | {"prompt_id": "0"} for r in prompts("y ", "v")], {}, name="eval.jsonl")
    data = load(config_of(train, eval=str(held_out)), loader)
    assert (len(data.train), len(data.eval), data.overlap) == (6, 4, 1)
    assert [Path(r.source).name for r in data.rejected] == ["eval.jsonl"]


def test_limits_apply(loader: Loader) -> None:
    config = config_of(loader.write(*prompts("w", "x", "y", "z")), eval_fraction=0.5, max_train=3, max_eval=2)
    data = load(config, loader)
    assert (len(data.train), len(data.eval)) == (2, 2)
    config.rollout.prompts_per_step = 3
    with pytest.raises(DataError, match=r"2 rows are left after .*prompts_per_step needs 3"):
        load(config, loader)


def test_errors_name_the_setting(loader: Loader) -> None:
    train, empty = loader.write(*prompts("w", "x")), loader.write(name="empty.jsonl")
    config = copy.deepcopy(config_of(train, eval="missing.jsonl"))
    with pytest.raises(DataError, match=r"data\.eval: missing\.jsonl: no such file"):
        load(config, loader)
    with pytest.raises(DataError, match=r"data\.train: .*empty\.jsonl: 0 usable rows, and at least 2"):
        load(config_of(empty), loader)
    with pytest.raises(DataError, match=r"data\.eval: .*empty\.jsonl: 0 usable rows, and at least 1"):
        load(config_of(train, eval=str(empty)), loader)


# Data of which too little can be used, and several benchmarks


def test_labels_off_the_scale_are_counted_and_stop_the_run(loader: Loader, caplog: pytest.LogCaptureFixture) -> None:
    scores = [r | {"score": i % 10} for i, r in enumerate(prompts(*map(str, range(50))))]
    config = config_of(loader.write(*scores), eval_fraction=0.5)
    message = (
        r"data\.train: .*rows\.jsonl: 50 of 100 records cannot be used, 50%, where data\.max_rejected allows 20%: "
        r"50 rejected: label is off the scale \(first rows\.jsonl:1: 0 is not within 1 to 5\)\. .*scale\.values.*"
        r"data\.max_rejected to 1"
    )
    with pytest.raises(DataError, match=message):
        load(config, loader)
    config.data.max_rejected = 0.5
    data = load(config, loader)
    assert len(data.train) + len(data.eval) == 50 and len(data.rejected) == 50
    assert "50 of 100 records cannot be used: 50 rejected: label is off the scale (first" in caplog.text
    few = config_of(loader.write(*prompts("w", "x", "y"), {}, {"score": 3}), eval_fraction=0.5)  # 2 of 8, two reasons
    with pytest.raises(DataError, match=r"25%.*rejected: instruction is (missing|empty)"):
        load(few, loader)


def test_too_many_evaluation_rows_that_cannot_be_used(loader: Loader) -> None:
    train = loader.write(*prompts("w", "x"), name="train.jsonl")
    held_out = loader.write(GOOD, GOOD | {"response": "word " * 500}, name="eval.jsonl")
    config = config_of(train, eval=str(held_out))
    config.prompt.max_tokens = 200
    with pytest.raises(DataError, match=r"data\.eval: .*1 of 2 records.*prompt is too long.*prompt\.max_tokens\)"):
        load(config, loader)
    config.data.max_rejected = 1
    assert len(load(config, loader).eval) == 1


def test_several_benchmarks(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(loader.folder)
    train = loader.write(*prompts("w", "x"), name="train.jsonl")
    for name in ("mt.v1", "flask", "more"):
        loader.write(*[r | {"id": f"{name}-{i}"} for i, r in enumerate(prompts("y", "z"))], name=f"{name}.jsonl")
    named = {"mt": "mt.v1.jsonl", "flask": [{"path": "flask.jsonl"}, "more.jsonl"]}
    data = load(config_of(train, eval=named), loader)
    assert Counter(r.benchmark for r in data.eval) == {"mt": 4, "flask": 8}
    assert {r.benchmark for r in data.train} == {""}
    listed = load(config_of(train, eval=["mt.v1.jsonl", "flask.jsonl"], max_eval=2), loader)
    assert Counter(r.benchmark for r in listed.eval) == {"mt": 2, "flask": 2}
    assert {r.benchmark for r in load(config_of(train, eval="flask.jsonl"), loader).eval} == {""}
    assert [r.id for r in first_of_each(data.eval, 4)] == ["mt.v1-0", "mt.v1-1", "flask-0", "flask-1"]
    with pytest.raises(DataError, match=r"data\.eval\.flask: gone\.jsonl: no such file"):
        load(config_of(train, eval={"mt": "mt.v1.jsonl", "flask": "gone.jsonl"}), loader)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (["a/x.jsonl", "b/x.csv"], "'x' stands there twice: name the benchmarks"),
        ({"a/b": "x"}, "'a/b' is no name"),
        ({" ": "x"}, "' ' is no name"),
        ([["x", "y"]], "needs a name"),
        ([], "names no benchmark"),
        ({}, "names no benchmark"),
    ],
)
def test_benchmarks_without_a_name_of_their_own(setting: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        benchmarks(setting)


def test_a_hub_datasets_configuration_and_revision(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(prompts("w", "x"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    test = {"path": "me/y", "split": "test", "revision": "v2"}
    load(config_of("me/x", config="main", revision="v1", eval={"one": test, "two": "me/z"}), loader)
    assert asked == [
        (("me/x",), {"split": "train", "name": "main", "revision": "v1"}),
        (("me/y",), {"split": "test", "name": "main", "revision": "v2"}),
        (("me/z",), {"split": "test", "name": "main", "revision": "v1"}),
    ]


@pytest.mark.parametrize(
    "text",
    [
        'instruction;response;"rubric, for all, of us, here";score;rubric\ni;r;x;3;c\n',
        "instruction|response|rubric|score\ni|r|c|3\n",
        "sep=;\ninstruction;response;rubric;score\ni;r;c;3\n",
        '"sep=;"\r\ninstruction;response;rubric;score\r\ni;r;c;3\r\n',
    ],
)
def test_the_separator_is_the_headers_own(loader: Loader, text: str) -> None:
    (loader.folder / "a.csv").write_text(text, newline="")
    [row] = loader.source(loader.folder / "a.csv")
    assert (row.instruction, row.response, row.rubric, row.label) == ("i", "r", "c", 3.0)
    assert row.id == f"a.csv:{text.count(chr(10))}"  # its line in the file


@pytest.mark.parametrize("ours", ["response", "reference_answer", "feedback", "prompt_id"])
def test_a_mapped_field_that_no_record_has_is_an_error(loader: Loader, ours: str) -> None:
    path = loader.write(GOOD, GOOD | {"more": {"deep": None}})
    known = DataConfig(fields={ours: "more.deep"})
    load_rows(str(path), "", loader.builder, loader.scale, 2048, [], known)  # one record has it, empty
    wrong = DataConfig(fields={ours: "more.depp"})
    with pytest.raises(
        DataError, match=rf"data\.fields\.{ours} is 'more\.depp', which no record .* instruction, more, "
    ):
        load_rows(str(path), "", loader.builder, loader.scale, 2048, [], wrong)
