"""The judge from Python, under prometheus-eval's names, awaited, and as a command on JSON lines."""

from __future__ import annotations

import asyncio
import io
import json
import math
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pytest
import torch

from real_fast import Grade, GradeError, Judge
from real_fast import judge as command
from real_fast.config import RolloutConfig
from real_fast.config.cli import parse
from real_fast.config.commands import COMMANDS
from real_fast.data.readers import jsonl_records
from real_fast.data.rows import parse_row
from real_fast.errors import ConfigError
from real_fast.evaluation.run import evaluate
from real_fast.judging.lines import grade_lines
from real_fast.model.judge_settings import defaults_of
from real_fast.types import Rollout, SamplingParams
from tests.judging.fakes import ROW, FakeEngine, rollout

Tiny = Callable[..., Any]
RUBRIC = {"criteria": "Is it a fruit?", "score1_description": "No.", "score5_description": "Yes."}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def judge(folder: Path) -> Iterator[Judge]:
    with Judge(folder, engine="transformers", precision="fp32", device="cpu") as made:
        yield made


# From Python


def test_importing_the_package_brings_no_torch() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import real_fast; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_trained_folder_is_taken_over_and_arguments_win(judge: Judge, folder: Path, with_engine: Any) -> None:
    assert judge.scale.texts == ("1", "2", "3") and judge.scale.phrase == "Grade: "
    config = judge.config
    assert (config.prompt.template, config.prompt.max_tokens, config.rollout.max_tokens) == ("short", 120, 6)
    assert config.objective.renormalize
    assert sum((judge.grade(**ROW).distribution or {}).values()) == pytest.approx(1.0)
    other = with_engine(FakeEngine([]), scale=[1, 5], renormalize=False, rollout=RolloutConfig(max_tokens=9))
    assert (other.scale.texts, other.scale.phrase) == (("1", "5"), "Grade: ")
    assert other.config.rollout.max_tokens == 9 and not other.config.objective.renormalize


def test_a_mapping_changes_some_of_the_folders_settings(with_engine: Any) -> None:
    changes: dict[str, Any] = {"prompt": {"max_tokens": 400}, "rollout": {"max_tokens": 20, "engine": "transformers"}}
    config = with_engine(FakeEngine([]), **changes).config
    assert (config.prompt.template, config.prompt.system, config.prompt.max_tokens) == ("short", "Grade.", 400)
    rollouts = config.rollout
    assert (rollouts.max_tokens, rollouts.engine, rollouts.gpu_memory_utilization) == (20, "transformers", 0.9)
    with pytest.raises(ConfigError, match="max_token"):
        with_engine(FakeEngine([]), prompt={"max_token": 400})
    with pytest.raises(ConfigError, match="max_tokens"):
        with_engine(FakeEngine([]), rollout={"max_tokens": "many"})


def test_a_trained_model_on_the_hub_is_taken_over_as_a_folder_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fetched: list[Any] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        fetched.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("real_fast.model.load.snapshot_download", download)
    found = parse(COMMANDS["judge"], "real-fast judge", ["--model", "me/judge"], defaults_of)
    assert (found.scale.values, found.prompt.template, found.renormalize) == ([1, 2, 3], "short", True)
    # No weights before the flags are read.
    assert fetched == [("me/judge", ["real_fast.json", "*.jinja", "*.j2", "*.txt"])]
    monkeypatch.setattr("real_fast.judging.judge.load_engine", lambda *_: FakeEngine([]))
    assert Judge("me/judge").scale.texts == ("1", "2", "3")


def test_the_protocol_of_the_run_is_taken_over(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(shutil.copytree(folder, tmp_path / "final"))
    saved = json.loads((model / "real_fast.json").read_text()) | {"eval": {"protocol": "raft"}}
    (model / "real_fast.json").write_text(json.dumps(saved))
    monkeypatch.setattr("real_fast.judging.judge.load_engine", lambda *_: FakeEngine([]))
    assert [Judge(m).config.eval.protocol for m in (model, folder)] == ["raft", "real"]
    assert Judge(model, protocol="decode").config.eval.protocol == "decode"
    flags = [["--model", str(model)], ["--model", str(model), "--protocol", "tract"], ["--model", str(folder)]]
    found = [parse(COMMANDS["judge"], "real-fast judge", argv, defaults_of).protocol for argv in flags]
    assert found == ["raft", "tract", "real"]


def test_a_grade_is_what_an_evaluation_predicts(judge: Judge) -> None:
    found = judge.grade_batch([ROW, {**ROW, "response": "A car."}], seed=3)
    rows = [parse_row({**ROW, "response": r, "score": 1}, r, judge.scale, True) for r in ("An apple.", "A car.")]
    for row in rows:
        row.prompt_ids = judge._builder.ids(row)
    want = evaluate(judge._engine, rows, judge.scale, judge.config.eval, judge.config.rollout, 3, renormalize=True)
    for grade, row in zip(found, want.predictions, strict=True):
        assert (grade.score, grade.distribution, grade.decoded) == (
            row["prediction"],
            row["distribution"],
            row["decoded"],
        )
        assert grade.off_scale_mass == row["off_scale_mass"] > 0
        assert row["feedback"].strip() == f"{grade.feedback} Grade:" and grade.error is None


def test_a_seed_repeats_and_another_samples_anew(judge: Judge) -> None:
    first = judge.grade(**ROW, seed=1)
    assert judge.grade(**ROW, seed=1) == first == judge.grade_batch([ROW], seed=1)[0]
    assert judge.grade(**ROW, seed=2).feedback != first.feedback


def test_feedbacks_are_averaged_and_lose_the_phrase(with_engine: Any) -> None:
    engine = FakeEngine([rollout([0.5, 0.25, 0.125], 2.0), rollout([0.125, 0.25, 0.5], None, "Bad.\nGrade: ")])
    judge = with_engine(engine, n=2, temperature=0.5, renormalize=False, protocol="tract")
    grade = judge.grade(**ROW)
    assert grade.feedback == ["Good.", "Bad."]
    assert grade.score == pytest.approx((1 * 0.625 + 2 * 0.5 + 3 * 0.625) / 2)
    assert (grade.off_scale_mass, grade.decoded, grade.error) == (pytest.approx(0.125), 2.0, None)
    sampling = engine.calls[0][1]
    assert (sampling.n, sampling.temperature, sampling.answer, sampling.max_tokens) == (2, 0.5, "cut", 6)
    judge.close()
    assert engine.closed
    with pytest.raises(RuntimeError, match="closed"):
        judge.grade(**ROW)
    with pytest.raises(RuntimeError, match="this judge is closed"):
        asyncio.run(judge.agrade(**ROW))


def test_a_loaded_model(tiny_llama: Tiny, small_tokenizer: Any) -> None:
    model = tiny_llama(vocab_size=len(small_tokenizer), hidden_size=16)
    rollout = RolloutConfig(max_tokens=4)
    with Judge(model, tokenizer=small_tokenizer, rollout=rollout, renormalize=True) as judge:
        grade = judge.grade(**ROW)
        assert judge.scale.texts == ("1", "2", "3", "4", "5") and 1 < (grade.score or 0) < 5
    with pytest.raises(ConfigError, match="give the model's folder"):
        Judge(model, tokenizer=small_tokenizer, engine="vllm")
    with pytest.raises(ConfigError, match="give its tokenizer"):
        Judge(model)
    with pytest.raises(ConfigError, match=r"^n is 0: it must be above 0"):
        Judge(model, tokenizer=small_tokenizer, n=0)


def test_rows_that_cannot_be_graded_say_why_and_the_rest_go_on(with_engine: Any) -> None:
    engine = FakeEngine([rollout([0.5, 0.25, 0.125])])
    judge = with_engine(engine)
    rows = [
        ROW,
        {**ROW, "response": ""},
        {**ROW, "instruction": "long " * 200},
        {**ROW, "response": "A red car."},
        7,
        ROW,
    ]
    length = len(judge._prompt(rows[3]))
    engine.fails_at = length
    assert length != len(judge._prompt(ROW))
    grades = judge.grade_batch(rows)
    assert [g.error is None for g in grades] == [True, False, False, False, False, True]
    assert grades[1].error == "response is empty: the field response"
    assert "prompt is too long: " in grades[2].error and "prompt.max_tokens is 120" in grades[2].error
    assert grades[3].error == "sampling failed: MemoryError: the cache is full"
    assert grades[4].error == "not an object: int"
    assert all(g.score is None and g.feedback is None for g in grades if g.error)
    with pytest.raises(GradeError, match="response is empty"):
        judge.grade("Name a fruit.", " ")


class Odd(Mapping[str, Any]):
    """A record whose fields cannot be read."""

    def __getitem__(self, key: str) -> Any:
        raise ZeroDivisionError("no such luck")

    def __iter__(self) -> Iterator[str]:
        return iter(("response",))

    def __len__(self) -> int:
        return 1


def test_no_row_takes_the_others_down(with_engine: Any) -> None:
    odd: list[Any] = [float("nan"), pandas.NA, None, np.array(["a", "b"]), [], {}, 7, b"bytes", "\ud800"]
    rows = [ROW, *({**ROW, "response": value} for value in odd), *({**ROW, "extra": value} for value in odd)]
    rows += [{**ROW, "id": value, "rubric": {"criteria": value}} for value in odd]
    rows += [*odd, Odd(), ROW]
    grades = with_engine(FakeEngine([rollout([0.5, 0.25, 0.25])])).grade_batch(rows)
    assert len(grades) == len(rows) and all((g.score is None) == (g.error is not None) for g in grades)
    assert grades[0].score == grades[-1].score == pytest.approx(1.75)
    assert all(g.error for g in grades[1 : 1 + len(odd)])  # none of these is a response
    assert all(g.score is not None for g in grades[1 + len(odd) : 1 + 2 * len(odd)])  # nobody asked for that field
    assert "ZeroDivisionError: no such luck" in grades[-2].error


def test_a_data_frame_is_its_rows_and_a_row_is_no_list_of_rows(with_engine: Any) -> None:
    judge = with_engine(FakeEngine([rollout([0.5, 0.25, 0.25])]))
    frame = pandas.DataFrame([{**ROW, "human": 3}, {**ROW, "response": None}])
    for rows in (frame, pyarrow.Table.from_pandas(frame)):
        first, second = judge.grade_batch(rows)
        assert first.score == pytest.approx(1.75) and second.error.startswith("response is")
    assert len(judge.grade_batch(row for row in [ROW, ROW])) == 2 and judge.grade_batch([]) == []
    for wrong in (ROW, "rows.jsonl", None, 7):
        with pytest.raises(GradeError, match=rf"rows is a {type(wrong).__name__}: give a list of rows"):
            judge.grade_batch(wrong)
    with pytest.raises(ConfigError, match="seed is 'x': it must be a whole number"):
        judge.grade_batch([ROW], seed="x")


def test_a_failed_call_keeps_nothing_while_the_others_are_sampled(with_engine: Any) -> None:
    """Its frames hold the key-value cache; alive, they would take the memory that the next call needs."""

    class Cache: ...

    alive: weakref.WeakSet[Cache] = weakref.WeakSet()

    class Greedy(FakeEngine):
        def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Rollout]]:
            assert not alive
            cache = Cache()
            alive.add(cache)
            return super().generate(prompts, sampling)

    judge = with_engine(Greedy([rollout([0.5, 0.25, 0.25])]))
    rows = [ROW, *[{**ROW, "response": "An apple and a pear."}] * 3, ROW]
    judge._engine.fails_at = len(judge._prompt(rows[1]))
    grades = judge.grade_batch(rows)
    assert [g.error for g in grades] == [None, *["sampling failed: MemoryError: the cache is full"] * 3, None]


def test_what_an_engine_gives_that_is_no_sample_is_no_score(with_engine: Any) -> None:
    good = rollout([0.5, 0.25, 0.25])
    for wrong, why in (
        ([good, good], "prompt 0: the rollout engine fake gave 2 rollouts, and 1 were asked for"),
        ([], "gave 0 rollouts"),
        ([replace(good, sampled_ids=[100], context_ids=[100])], "the token id 100"),
        ([replace(good, sampled_logprobs=[math.nan])], "is not finite"),
        ([replace(good, score_logprobs=[-0.5, -0.5, -0.5])], "the scores' probabilities add up to 1.82"),
        ([replace(good, score_logprobs=[-0.5, -0.5])], "2 score log-probabilities"),
        ([replace(good, sampled_ids=[], sampled_logprobs=[], context_ids=[], finish="length")], "an empty text"),
    ):
        for grade in with_engine(FakeEngine(wrong)).grade_batch([ROW] * 3):
            assert grade.score is None and grade.distribution is None and why in (grade.error or "")
    for missing in (None, [math.nan] * 3):
        grade = with_engine(FakeEngine([replace(good, score_logprobs=missing)])).grade(**ROW)
        assert (grade.score, grade.error) == (None, "no score: none of the feedbacks has one")


def test_a_feedback_without_a_score_is_kept_with_an_error(with_engine: Any) -> None:
    grade = with_engine(FakeEngine([rollout(None, text="No idea.")]), protocol="decode").grade(**ROW)
    assert (grade.feedback, grade.score, grade.error) == ("No idea.", None, "no score: none of the feedbacks has one")


def test_many_rows_go_to_the_engine_in_slices_with_seeds_of_their_own(with_engine: Any) -> None:
    engine = FakeEngine([rollout([0.5, 0.25, 0.125])] * 2)
    with_engine(engine, n=2, rollout=RolloutConfig(max_num_seqs=6)).grade_batch([ROW] * 7)
    assert [len(prompts) for prompts, _ in engine.calls] == [3, 3, 1]
    assert len({sampling.seed for _, sampling in engine.calls}) == 3


# prometheus-eval's names


def test_prometheus_evals_calls_work(with_engine: Any) -> None:
    engine = FakeEngine([rollout([0.5, 0.25, 0.25])])
    judge = with_engine(engine)
    feedback, score = judge.single_absolute_grade(
        instruction="Name a fruit.", response="An apple.", rubric=RUBRIC, reference_answer="Plum.", params={}
    )
    assert (feedback, score) == ("Good.", pytest.approx(1.75))
    prompt = judge._builder.tokenizer.decode(engine.calls[0][0][0])
    assert all(part in prompt for part in ("[Is it a fruit?]\nScore 1: No.\nScore 5: Yes.", "Plum.", "An apple."))
    feedbacks, scores = judge.absolute_grade(
        instructions=["Name a fruit.", "Name a tool."],
        responses=["An apple.", "A saw."],
        rubric=["Is it a fruit?", "Is it a tool?"],
        reference_answers=["Plum.", None],
        params={"temperature": 0.0, "max_tokens": 5},
    )
    assert feedbacks == ["Good.", "Good."] and scores == pytest.approx([1.75, 1.75])
    prompts, sampling = engine.calls[1]
    first, second = (judge._builder.tokenizer.decode(ids) for ids in prompts)
    assert "Is it a tool?" in second and "Plum." in first and "Plum." not in second
    assert (sampling.temperature, sampling.max_tokens) == (0.0, 5)
    same = judge.absolute_grade(instructions=["a", "b"], responses=["c", "d"], rubric="One for all")
    assert len(same[1]) == 2


def test_prometheus_evals_parameters_are_checked_before_the_work(with_engine: Any) -> None:
    engine = FakeEngine([rollout([0.5, 0.25, 0.25])])
    judge = with_engine(engine)
    neutral = {"best_of": 1, "repetition_penalty": 1.0, "top_k": -1, "top_p": 0.9}
    assert judge.single_absolute_grade("a", "b", "c", params=neutral)[1] == pytest.approx(1.75)
    for wrong in (
        {"n": 0},
        {"n": 1.5},
        {"temperature": -1},
        {"top_p": 5},
        {"top_p": 0},
        {"max_tokens": 0},
        {"seed": None},
    ):
        with pytest.raises(ConfigError, match="params"):
            judge.single_absolute_grade("a", "b", "c", params=wrong)
    assert len(engine.calls) == 1


def test_prometheus_evals_calls_refuse_what_they_cannot_honour(with_engine: Any) -> None:
    judge = with_engine(FakeEngine([rollout([0.5, 0.25, 0.25])]))
    with pytest.raises(ConfigError, match="stop"):
        judge.single_absolute_grade("a", "b", "c", params={"stop": ["."]})
    with pytest.raises(ValueError, match="2 instructions, 1 responses"):
        judge.absolute_grade(instructions=["a", "b"], responses=["c"], rubric="r")
    with pytest.warns(UserWarning, match="response 1 has no score: response is empty"):
        feedbacks, scores = judge.absolute_grade(instructions=["a", "b"], responses=["c", ""], rubric="r")
    assert feedbacks == ["Good.", None] and scores[1] is None and scores[0] is not None


# Threads and event loops


def test_calls_from_many_threads_wait_for_each_other(with_engine: Any) -> None:
    engine = FakeEngine([rollout([0.5, 0.25, 0.25])], seconds=0.02)
    judge = with_engine(engine)
    threads = [threading.Thread(target=judge.grade, kwargs=ROW) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(engine.calls) == 6 and engine.most_inside == 1


def test_an_event_loop_goes_on_while_a_judge_works(with_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, gate, waited = FakeEngine([rollout([0.5, 0.25, 0.25])]), threading.Event(), list[bool]()
    generate = engine.generate

    def when_the_loop_lets_it(prompts: Any, sampling: Any) -> Any:
        waited.append(gate.wait(3.0))
        return generate(prompts, sampling)

    monkeypatch.setattr(engine, "generate", when_the_loop_lets_it)
    judge = with_engine(engine)

    async def handler() -> list[Grade]:
        requests = [asyncio.create_task(judge.agrade(**ROW, seed=s)) for s in range(3)]
        batch = asyncio.create_task(judge.agrade_batch([ROW]))
        await asyncio.sleep(0.05)
        gate.set()  # which a loop that a judge holds up never gets to
        return [*await asyncio.gather(*requests), *await batch]

    assert [g.score for g in asyncio.run(handler())] == pytest.approx([1.75] * 4)
    assert waited == [True] * 4 and engine.most_inside == 1


# On JSON lines


class StubJudge:
    """The score is the length of the response; calls are remembered."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[Any], int]] = []

    def grade_batch(self, rows: Sequence[Any], seed: int = 0) -> list[Grade]:
        self.calls.append((list(rows), seed))
        return [
            Grade("ok", float(len(r["response"])), {"1": 1.0}, 0.0) if r.get("response") else Grade(error="no response")
            for r in rows
        ]


def graded(data: str, key: str = "grade") -> list[dict[str, Any]]:
    records = list(jsonl_records(data.encode().splitlines(keepends=True)))
    return [json.loads(line) for line, _ in grade_lines(StubJudge(), records, key, 0)]


def test_a_line_for_every_line_in_order_with_its_own_fields() -> None:
    lines = graded('{"id": 9, "response": "abc", "x": [1.5, null, "é"]}\n\n{"response": ""}\n{"response": "z"}\n')
    assert lines[0] == {
        "id": 9,
        "response": "abc",
        "x": [1.5, None, "é"],
        "grade": {"feedback": "ok", "score": 3.0, "distribution": {"1": 1.0}, "off_scale_mass": 0.0, "decoded": None},
    }
    assert lines[1] == {"response": "", "grade": {"error": "no response"}}
    assert lines[2]["grade"]["score"] == 1.0


def test_what_is_no_json_object_is_kept_with_the_reason() -> None:
    lines = graded('{"response": "a"}\n{oops\n[1]\n{"response": Infinity}\n{"response": "b", "x": [NaN], "id": NaN}')
    assert [line["grade"].get("score") for line in lines] == [1.0, None, None, None, 1.0]
    assert (
        lines[1]["row"] == "{oops"
        and "not JSON" in lines[1]["grade"]["error"]
        and "line 2" in lines[1]["grade"]["error"]
    )
    assert lines[2] == {"row": [1], "grade": {"error": "not an object: list"}}
    assert lines[3]["row"] == '{"response": Infinity}' and "not JSON" in lines[3]["grade"]["error"]
    assert (lines[4]["x"], lines[4]["id"]) == ([None], None)  # NaN is pandas' missing value, which is null in JSON


def test_whatever_depth_can_be_read_can_be_written() -> None:
    for depth in (62, 63, 64, 65, 900, 1000, 5000):
        text = f'{{"response": "a", "x": {"[" * depth}{"]" * depth}}}'
        [line] = graded(text + "\n")
        assert line.get("x") is not None or line["row"].replace(" ", "") == text.replace(" ", "")
        assert "score" in line["grade"] or "nested" in line["grade"]["error"] or "not JSON" in line["grade"]["error"]


def test_nobodys_field_is_overwritten() -> None:
    data = '{"response": "a", "grade": "B+", "grade_2": 0}\n{"response": "bb"}\n'
    first, second = graded(data)
    assert first["grade"] == "B+" and first["grade_2"] == 0 and "choose another --key" in first["grade_3"]["error"]
    assert second["grade"]["score"] == 2.0
    assert graded(data, key="verdict")[0]["verdict"]["score"] == 1.0


class Pipe(io.RawIOBase):
    """A pipe: cannot be sought in, and remembers how far it has been read."""

    def __init__(self, lines: list[bytes]) -> None:
        self.lines, self.read_lines = lines, 0

    def readable(self) -> bool:
        return True

    def __next__(self) -> bytes:
        if self.read_lines == len(self.lines):
            raise StopIteration
        self.read_lines += 1
        return self.lines[self.read_lines - 1]


class Watched(io.BytesIO):
    """Output that notes, at each flush, how much of the input had been read."""

    def __init__(self, source: Pipe) -> None:
        super().__init__()
        self.source, self.flushes = source, list[tuple[int, int]]()

    def flush(self) -> None:
        self.flushes.append((self.getvalue().count(b"\n"), self.source.read_lines))


def test_batches_are_written_as_they_are_done() -> None:
    source = Pipe([b'{"response": "%d"}\n' % i for i in range(7)])
    out, judge = Watched(source), StubJudge()
    config = command.JudgeConfig(model="m", batch_size=3)
    assert command.run(config, source, out, lambda: judge) == command.Done(rows=7)
    assert out.flushes == [(3, 3), (6, 6), (7, 7)]  # nothing is read ahead of what is written
    assert [len(rows) for rows, _ in judge.calls] == [3, 3, 1] and len({seed for _, seed in judge.calls}) == 3


def test_a_taken_field_in_the_first_rows_stops_before_the_model_loads() -> None:
    source = io.BytesIO(b'{"response": "a"}\n{"grade": 1}\n')
    with pytest.raises(ConfigError, match=r"line 2 has a field .grade. already.*--key"):
        command.run(command.JudgeConfig(model="m"), source, io.BytesIO(), lambda: pytest.fail("loaded"))
    assert command.run(command.JudgeConfig(model="m"), io.BytesIO(b"\n"), io.BytesIO(), StubJudge) == command.Done()


def test_the_command(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ({**ROW, "id": 1}, {"id": 2}, {**ROW, "id": 3})))
    argv = ["--model", str(folder), "--data", str(data), "--rollout.engine", "transformers", "--precision", "fp32"]
    status = command.main([*argv, "--device", "cpu", "--batch_size", "2", "--n", "2"])
    out, err = capfd.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [line["id"] for line in lines] == [1, 2, 3]
    assert set(lines[0]["grade"]["distribution"]) == {"1", "2", "3"} and len(lines[0]["grade"]["feedback"]) == 2
    assert "instruction is missing" in lines[1]["grade"]["error"]
    assert "2 of 3 rows graded; first without: line 2: instruction is missing" in err and "grade: 100%" in err
    data.write_text('{"id": 2}\n')
    assert command.main(argv) == 1


def test_what_a_library_prints_stays_out_of_the_results(capfd: pytest.CaptureFixture[str]) -> None:
    with command.results_alone() as out:
        print("loading")
        subprocess.run([sys.executable, "-c", "print('child')"], check=True)
        out.write(b"{}\n")
    print("after")
    found = capfd.readouterr()
    assert found.out == "{}\nafter\n" and "loading" in found.err and "child" in found.err


def test_mistakes_of_the_users(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def failure(*argv: str) -> str:
        try:
            status = command.main(argv)
        except SystemExit as exit:
            status = int(exit.code or 0)
        out, err = capfd.readouterr()
        assert (status, out) == (2, "") and err.startswith("real-fast judge: error: ") and "Traceback" not in err
        return err

    assert "model is not set" in failure()
    some = str(tmp_path)  # a folder, with nothing in it yet
    assert "batch_size is 0" in failure("--model", some, "--batch_size", "0")
    assert "give --temperature" in failure("--model", some, "--rollout.temperature", "0.5")
    assert "key is 'row'" in failure("--model", some, "--key", "row")
    assert "cannot be read" in failure("--model", some, "--data", str(tmp_path / "none.jsonl"))
    assert "give a .jsonl" in failure("--model", some, "--data", "rows.csv")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(ROW))
    assert "does not exist" in failure("--model", str(tmp_path / "nowhere"), "--data", str(rows))


def test_renormalized_scores_of_the_fixture_are_really_so(judge: Judge) -> None:
    """The random model puts almost nothing on the scores; without renormalize their sum would be that."""
    assert torch.tensor(judge.grade(**ROW).off_scale_mass) > 0.9
