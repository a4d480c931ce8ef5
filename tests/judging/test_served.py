"""A judge behind a server: examples/serve.py, and the grade out of an OpenAI completion."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from real_fast import GradeError, Judge
from real_fast.errors import ConfigError, JudgeError, RowError
from real_fast.judging.served import ServedJudge
from real_fast.types import SamplingParams
from tests.helpers import serve_example
from tests.judging.fakes import ROW, FakeEngine, rollout

ROOT = Path(__file__).resolve().parents[2]
TOP = {"1": math.log(0.1), "2": math.log(0.2), "3": math.log(0.6), "oops": math.log(0.1)}
Tokens = list[tuple[str, dict[str, float]]]


def answer(*middle: str, score: str = "3", behind: tuple[str, ...] = ("<eos>",), top: dict[str, float] = TOP) -> Tokens:
    """An answer's tokens; every one has the same likeliest others, and the score stands behind "Grade: "."""
    plain = {"word": -0.5}
    return [*((t, plain) for t in (*middle, "Grade", ":", " ")), (score, top), *((t, plain) for t in behind)]


def completion(*answers: Tokens) -> dict[str, Any]:
    """As the completions endpoint gives it."""
    return {
        "choices": [
            {
                "text": "".join(t for t, _ in tokens),
                "logprobs": {
                    "tokens": [t for t, _ in tokens],
                    "token_logprobs": [top.get(t, -1.0) for t, top in tokens],
                    "top_logprobs": [top for _, top in tokens],
                },
            }
            for tokens in answers
        ]
    }


def chat(tokens: Tokens) -> dict[str, Any]:
    """As the chat endpoint gives it."""
    content = [
        {"token": t, "logprob": top.get(t, -1.0), "top_logprobs": [{"token": k, "logprob": v} for k, v in top.items()]}
        for t, top in tokens
    ]
    text = "".join(t for t, _ in tokens)
    return {"choices": [{"message": {"content": text}, "logprobs": {"content": content}}]}


@pytest.fixture(scope="module")
def served(folder: Path, small_tokenizer: Any) -> ServedJudge:
    judge = ServedJudge(folder, tokenizer=small_tokenizer, rollout={"top_p": 0.9})
    judge.config.objective.renormalize = False
    return judge


@pytest.mark.parametrize("form", [completion, chat])
def test_the_expected_score_is_read_behind_the_phrase(served: ServedJudge, form: Callable[[Tokens], Any]) -> None:
    grade = served.grade(form(answer("Good", ", ", "2", " of ", "3", ". ")))
    assert grade.score == pytest.approx(0.1 + 2 * 0.2 + 3 * 0.6) and grade.decoded == 3.0
    assert grade.distribution == pytest.approx({"1": 0.1, "2": 0.2, "3": 0.6})
    assert grade.off_scale_mass == pytest.approx(0.1) and grade.feedback == "Good, 2 of 3." and grade.error is None


def test_the_clients_own_objects_are_taken(served: ServedJudge) -> None:
    openai = pytest.importorskip("openai.types")
    rest = {"id": "c", "created": 0, "model": "m", "object": "text_completion"}
    plain = completion(answer("Good. "))
    plain["choices"][0] |= {"index": 0, "finish_reason": "stop"}
    assert served.grade(openai.Completion(**rest, **plain)) == served.grade(plain)
    talk = chat(answer("Good. "))
    talk["choices"][0] |= {"index": 0, "finish_reason": "stop"}
    talk["choices"][0]["message"]["role"] = "assistant"
    rest["object"] = "chat.completion"
    assert served.grade(openai.chat.ChatCompletion(**rest, **talk)).score == pytest.approx(2.3)


def test_several_choices_are_averaged(served: ServedJudge) -> None:
    grade = served.grade(completion(answer("A. "), answer("B. ", top={"1": 0.0}, score="1")))
    assert grade.score == pytest.approx((2.3 + 1.0) / 2) and grade.feedback == ["A.", "B."]


def test_the_verdict_is_that_of_the_engines(served: ServedJudge) -> None:
    """Outside thoughts and quotations, and the first: what a server samples behind it was never asked for."""
    thought = [("<think>", {}), ("Grade: 1?", {"1": 0.0}), ("</think>", {}), ("Fine. ", {})]
    more = ("\n", "Grade", ":", " ", "1")
    grade = served.grade(completion([*thought, *answer("Not ", '"Grade: 1"', ". ", behind=more)]))
    assert grade.score == pytest.approx(2.3) and grade.decoded == 3.0 and (grade.feedback or "").endswith('"Grade: 1".')
    ten = served.grade(completion(answer("Good. ", score="1", behind=("0", "."))))
    assert ten.decoded is None  # 10 is not 1


def test_no_score_is_made_up(served: ServedJudge) -> None:
    none = served.grade(completion([("No idea", {}), (".", {})]))
    assert none.score is None and none.feedback == "No idea." and "none of the feedbacks has one" in (none.error or "")
    cut = served.grade(completion(answer("Well. ")[:-2]))
    assert cut.score is None and cut.feedback == "Well."
    off = served.grade(completion(answer("Well. ", score="none", top={"none": -0.001, "3": -9.0})))
    assert off.score is None and "lies outside the scores" in (off.error or "")
    for wrong in ({"choices": [{"text": "x", "logprobs": None}]}, {"choices": []}, {}, "text"):
        with pytest.raises(GradeError, match="the completion has no"):
            served.grade(wrong)


def test_the_request_is_the_prompt_of_the_judge(served: ServedJudge, with_engine: Callable[..., Judge]) -> None:
    request = served.request(ROW)
    assert request["prompt"] == with_engine(FakeEngine([]))._prompt(ROW)
    assert (request["max_tokens"], request["temperature"], request["top_p"], request["logprobs"]) == (6, 1.0, 0.9, 20)
    assert request["extra_body"] == {"logprob_token_ids": list(served.scale.score_ids)}
    with pytest.raises(RowError, match="response is missing"):
        served.request({"instruction": "a"})
    with pytest.raises(ConfigError, match="temperature is -1"):
        ServedJudge("m", temperature=-1)


def test_a_served_grade_is_that_of_the_judge(folder: Path, small_tokenizer: Any) -> None:
    """The judge's own engine plays the server: what it sampled, token by token, with the scores' log-probabilities."""
    with Judge(folder, engine="transformers", precision="fp32", device="cpu", renormalize=True) as judge:
        prompt = judge._prompt(ROW)
        phrase = list(judge.scale.phrase_ids)
        [[forced]] = judge._engine.generate([prompt], SamplingParams(n=1, max_tokens=6, seed=1))  # type: ignore[union-attr]
        want = judge._verdict([forced])
        ids = [*forced.context_ids, judge.scale.score_ids[0]]
        assert list(forced.context_ids[-len(phrase) :]) == phrase and forced.score_logprobs is not None
        texts = [small_tokenizer.decode([i]) for i in ids]
        tops: list[dict[str, float]] = [{} for _ in ids]
        tops[-1] = dict(zip(judge.scale.texts, forced.score_logprobs, strict=True))
        found = ServedJudge(folder, tokenizer=small_tokenizer).grade(completion(list(zip(texts, tops, strict=True))))
    assert found.score == pytest.approx(want.score) and found.distribution == pytest.approx(want.distribution)
    assert found.feedback == want.feedback and found.warning == want.warning


def test_the_fastapi_example(with_engine: Callable[..., Judge]) -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    example = serve_example()
    judge = with_engine(FakeEngine([rollout([0.5, 0.25, 0.25])]))
    with testclient.TestClient(example.make_app(lambda: judge)) as client:
        good = client.post("/grade", json=ROW)
        assert good.status_code == 200 and good.json()["score"] == pytest.approx(1.75)
        assert good.json()["feedback"] == "Good."
        bad = client.post("/grade", json={**ROW, "response": " "})
        assert bad.status_code == 422 and "response is empty" in bad.json()["detail"]
        assert client.post("/grade", json={"instruction": "a"}).status_code == 422
    assert judge._engine is None  # closed with the server


def test_an_engine_that_fails_is_not_the_clients_fault(with_engine: Callable[..., Judge]) -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    judge = with_engine(FakeEngine([rollout([0.5, 0.25, 0.25])]))
    judge._engine.fails_at = len(judge._prompt(ROW))  # type: ignore[union-attr]
    with testclient.TestClient(serve_example().make_app(lambda: judge)) as client:
        failed = client.post("/grade", json=ROW)
        assert (
            failed.status_code == 503 and failed.json()["detail"] == "sampling failed: MemoryError: the cache is full"
        )
        assert client.post("/grade", json={**ROW, "response": " "}).status_code == 422
        with pytest.raises(JudgeError, match="sampling failed"):
            judge.grade(**ROW)
        assert judge.grade_batch([ROW])[0].error == failed.json()["detail"]


def test_a_client_that_hangs_up_gives_its_place_back(with_engine: Callable[..., Judge]) -> None:
    pytest.importorskip("fastapi")
    entered, gate = threading.Event(), threading.Event()

    class Held(FakeEngine):
        def generate(self, prompts: Any, sampling: Any) -> Any:
            entered.set()
            assert gate.wait(10)
            return super().generate(prompts, sampling)

    engine = Held([rollout([0.5, 0.25, 0.25])])
    app = serve_example().make_app(lambda: with_engine(engine))

    async def ask(response: str, hangs_up: bool) -> int:
        """The status of an answer, by the application's own protocol (ASGI)."""
        body = json.dumps({**ROW, "response": response}).encode()
        messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]
        found = []

        async def receive() -> Any:
            if len(messages) == 1 and not hangs_up:
                await asyncio.Event().wait()
            return messages.pop(0)

        async def send(message: Any) -> None:
            found.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/grade", "headers": headers, "query_string": b""}
        await app(scope, receive, send)
        return int(found[0]["status"])

    async def both() -> list[int]:
        async with app.router.lifespan_context(app):
            first = asyncio.ensure_future(ask("An apple.", hangs_up=False))
            await asyncio.to_thread(entered.wait, 10)
            late = await asyncio.wait_for(ask("A pear.", hangs_up=True), 5)
            gate.set()
            return [await first, late]

    assert asyncio.run(both()) == [200, 499]
    assert [len(prompts) for prompts, _ in engine.calls] == [1]


def test_a_template_may_need_further_fields_of_the_rows(folder: Path, small_tokenizer: Any, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{{ response }} {{ extra.category.upper() }}", encoding="utf-8")
    ServedJudge(folder, tokenizer=small_tokenizer, prompt={"template": str(template)})


@pytest.mark.parametrize("made", [completion, chat], ids=["completions", "chat"])
def test_log_probabilities_that_cannot_be_are_no_score(served: ServedJudge, made: Callable[..., Any]) -> None:
    for top in ({"1": 0.1, "2": 0.2, "3": 0.6}, {"1": -0.5, "2": -0.4, "3": -0.6}, {**TOP, "3": math.inf}):
        with pytest.raises(GradeError, match="the completion's log-probabilities are none"):
            served.grade(made(answer("Good.", top=top)))
    for broken in (None, math.nan):
        assert served.grade(made(answer("Good.", top={**TOP, "3": broken}))).score is None  # type: ignore[dict-item]
