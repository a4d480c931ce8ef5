"""Engines that fail, or that give what is no sample: refused before anything is made of it, and nothing is lost."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from real_fast.config import EvalConfig, RolloutConfig
from real_fast.distributed.ranks import Ranks
from real_fast.errors import EngineError, RolloutServerError
from real_fast.evaluation.run import evaluate
from real_fast.rollout import checked, make, vllm_client
from real_fast.rollout.checked import check, sample
from real_fast.rollout.spread import MainEngine, SpreadEngine
from real_fast.rollout.transformers_engine import TransformersEngine
from real_fast.rollout.vllm_server import VllmServerEngine
from real_fast.train import main
from real_fast.training import held_out, setup
from real_fast.types import JudgeRow, Rollout, SamplingParams
from tests.distributed.ranks import run_ranks
from tests.golden.trajectories import run_flags
from tests.helpers import SCALE, flags, metric_lines, same_weights
from tests.rollout.fake_server import FakeServer, failed

NAN = float("nan")
SAMPLING = SamplingParams(n=2, max_tokens=6)
PROMPTS = [[8, 9], [5, 6, 7]]
NAMES = ["row-a", "row-b"]


def rollouts() -> list[list[Rollout]]:
    """Two groups of an engine that works: one rollout that wrote the phrase, one that was cut off."""
    return [
        [
            Rollout([7, 60, 61], [-1.0] * 3, [7, 60, 61], 0, "phrase", [-2.0, -1.0, -3.0], 2.0),
            Rollout([7] * 6, [-1.0] * 6, [*[7] * 6, 60, 61], 2, "length", [-2.0, -math.inf, -3.0], None),
        ]
        for _ in PROMPTS
    ]


class Fixed:
    name, vocabulary, dtype = "fixed", 100, torch.float32

    def __init__(self, found: Any) -> None:
        self.found = found

    def generate(self, _prompts: Any, _sampling: Any) -> Any:
        if isinstance(self.found, BaseException):
            raise self.found
        return self.found


def last(**changes: Any) -> Callable[[list[list[Rollout]]], Any]:
    """The very last rollout, changed."""

    def change(found: list[list[Rollout]]) -> Any:
        found[1][1] = replace(found[1][1], **changes)
        return found

    return change


LAST = "row 'row-b', rollout 1: the rollout engine fixed gave no sample: "
WRONG: dict[str, tuple[Callable[[list[list[Rollout]]], Any], str]] = {
    "a group less": (lambda found: found[:1], "gave rollouts of 1 prompts, and got 2"),
    "a group more": (lambda found: [*found, found[0]], "gave rollouts of 3 prompts, and got 2"),
    "fewer samples": (lambda found: [found[0], found[1][:1]], "row 'row-b': .* gave 1 rollouts, and 2 were asked"),
    "more samples": (lambda found: [[*found[0], found[0][0]], found[1]], "row 'row-a': .* gave 3 rollouts"),
    "no samples": (lambda found: [[], found[1]], "row 'row-a': .* gave 0 rollouts"),
    "an empty text": (last(sampled_ids=[], sampled_logprobs=[], context_ids=[60, 61]), LAST + "an empty text"),
    "a text that breaks off": (
        last(sampled_ids=[7] * 4, sampled_logprobs=[-1.0] * 4, context_ids=[*[7] * 4, 60, 61]),
        LAST + "it breaks off after 4 of 6 tokens",
    ),
    "a negative id": (last(sampled_ids=[*[7] * 5, -1]), LAST + "the token id -1, and the model has the ids 0 to 99"),
    "an id above": (last(sampled_ids=[*[7] * 5, 100]), LAST + "the token id 100"),
    "an id above in the context": (last(context_ids=[*[7] * 6, 60, 10**9]), LAST + "the token id 1000000000"),
    "another text's ids": (last(sampled_ids=[7, 7, 8, 7, 7, 7]), LAST + "the sampled tokens are not those"),
    "a context that is shorter": (last(context_ids=[7, 7, 60, 61]), LAST + "the sampled tokens are not those"),
    "no context": (last(context_ids=[]), LAST + "the sampled tokens are not those"),
    "a log-probability less": (last(sampled_logprobs=[-1.0] * 5), LAST + "6 sampled tokens and 5 log-probabilities"),
    "a log-probability more": (last(sampled_logprobs=[-1.0] * 7), LAST + "6 sampled tokens and 7 log-probabilities"),
    "no log-probabilities": (last(sampled_logprobs=None), LAST),
    "None among them": (last(sampled_logprobs=[*[-1.0] * 5, None]), LAST),
    "NaN among them": (last(sampled_logprobs=[*[-1.0] * 5, NAN]), LAST + ".* is not finite"),
    "infinity among them": (last(sampled_logprobs=[*[-1.0] * 5, math.inf]), LAST + ".* is not finite"),
    "minus infinity among them": (last(sampled_logprobs=[*[-1.0] * 5, -math.inf]), LAST + ".* is not finite"),
    "probabilities": (last(sampled_logprobs=[0.3] * 6), LAST + ".* is 0.3, and none is above 0"),
    "more than max_tokens": (
        last(sampled_ids=[7] * 7, sampled_logprobs=[-1.0] * 7, context_ids=[*[7] * 7, 60, 61]),
        LAST + "7 sampled tokens, and max_tokens is 6",
    ),
    "no score": (last(score_logprobs=None), LAST + "no score log-probabilities, which were asked for"),
    "a score that was left out": (last(score_logprobs=None, unread=True), LAST + "no score log-probabilities"),
    "a score less": (last(score_logprobs=[-1.0, -2.0]), LAST + "2 score log-probabilities, and the scale has 3"),
    "NaN as a score": (last(score_logprobs=[-1.0, NAN, -2.0]), LAST + "the score log-probabilities are NaN"),
    "infinity as a score": (last(score_logprobs=[-1.0, math.inf, -2.0]), LAST + "a score's log-probability is inf"),
    "a score above 0": (last(score_logprobs=[-1.0, 0.5, -2.0]), LAST + "a score's log-probability is 0.5"),
    "scores shifted up": (last(score_logprobs=[-0.5, -0.4, -0.6]), LAST + "the scores' probabilities add up to 1.8"),
    "a rollout that is none": (lambda found: [found[0], [found[1][0], None]], "gave no lists of rollouts"),
    "nothing": (lambda found: None, "gave no lists of rollouts"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_sample_is_refused_with_its_row(kind: str) -> None:
    change, message = WRONG[kind]
    sample(Fixed(rollouts()), PROMPTS, SAMPLING, SCALE, NAMES)
    with pytest.raises(EngineError, match=message):
        sample(Fixed(change(rollouts())), PROMPTS, SAMPLING, SCALE, NAMES)


def test_what_is_allowed_stays_allowed() -> None:
    """Scores that nobody asked for, generated answers without one, an answer that begins with its end."""
    unread = [[replace(r, score_logprobs=None, unread=True) for r in group] for group in rollouts()]
    sample(Fixed(unread), PROMPTS, replace(SAMPLING, scores=False), SCALE, NAMES)
    ended = Rollout([7, 2], [-1.0, 0.0], [7], 0, "eos", None, None)
    sample(Fixed([[ended]]), [[1]], SamplingParams(n=1, max_tokens=6, answer="generated"), SCALE, NAMES)
    at_once = Rollout([], [], [60, 61], 2, "eos", [-1.0, -2.0, -3.0], None)
    for answer in ("cut", "none"):
        sample(Fixed([[at_once]]), [[1]], SamplingParams(n=1, max_tokens=6, answer=answer), SCALE, NAMES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error", [RuntimeError("EngineCore died"), MemoryError(), AssertionError("x"), ConnectionResetError("gone")]
)
def test_whatever_an_engine_raises_says_which_rows(error: Exception) -> None:
    with pytest.raises(EngineError, match=rf"fixed failed .*'row-a' to 'row-b' \({type(error).__name__}: "):
        sample(Fixed(error), PROMPTS, SAMPLING, SCALE, NAMES)
    with pytest.raises(RolloutServerError, match="as it is"):
        sample(Fixed(RolloutServerError("as it is")), PROMPTS, SAMPLING, SCALE, NAMES)
    with pytest.raises(KeyboardInterrupt):
        sample(Fixed(KeyboardInterrupt()), PROMPTS, SAMPLING, SCALE, NAMES)


def test_the_check_costs_next_to_nothing() -> None:
    """A large update, 256 rollouts of 2,048 tokens, in a hundredth of what decoding its texts once takes."""
    ids, logprobs = list(range(2048)), [-1.0] * 2048
    group = [Rollout(ids, logprobs, [*ids, 60, 61], 2, "length", [-2.0] * 3, None) for _ in range(256)]
    engine = Fixed(None)
    engine.vocabulary = 5000
    started = time.process_time()
    check([group], engine, 1, SamplingParams(n=256, max_tokens=2048), SCALE, ["a"])  # type: ignore[arg-type]
    assert time.process_time() - started < 0.5


# ---- evaluations and judges


def rows() -> list[JudgeRow]:
    return [JudgeRow(name, name, "", "", "", "", 2.0, [], [], [1, 2]) for name in NAMES]


@pytest.mark.parametrize("kind", sorted(WRONG.keys() - {"no score", "a score that was left out", "NaN as a score"}))
def test_an_evaluation_makes_no_score_of_it(kind: str) -> None:
    config, rollout = EvalConfig(n=2, bootstrap=5), RolloutConfig(max_tokens=6)
    assert evaluate(Fixed(rollouts()), rows(), SCALE, config, rollout, 0).summary["n_scored"] == 2  # type: ignore[arg-type]
    with pytest.raises(EngineError):
        evaluate(Fixed(WRONG[kind][0](rollouts())), rows(), SCALE, config, rollout, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["no score", "a score that was left out", "NaN as a score"])
def test_a_feedback_without_a_score_counts_in_no_number(kind: str) -> None:
    config, rollout = EvalConfig(n=2, bootstrap=5), RolloutConfig(max_tokens=6)
    found = WRONG[kind][0](rollouts())
    found[1][0] = found[1][1]
    result = evaluate(Fixed(found), rows(), SCALE, config, rollout, 0)  # type: ignore[arg-type]
    assert (result.summary["n_scored"], result.predictions[1]["prediction"]) == (1, None)


# ---- a server


def generated(fake: FakeServer) -> Callable[[Any], Any]:
    return fake.inference_v1_generate


PASSING: dict[str, Callable[[FakeServer], Any]] = {
    "closes connections": lambda fake: setattr(fake, "drop", 2),
    "gives half an answer": lambda fake: setattr(fake, "halve", 2),
    "answers 500": lambda fake: first_of(fake, failed("out of memory")),
    "answers 503": lambda fake: first_of(fake, (503, b"<html>busy</html>")),
    "answers 502 of a proxy": lambda fake: first_of(fake, (502, b"Bad Gateway")),
    "answers 429": lambda fake: first_of(fake, (429, {})),
    "gives garbage": lambda fake: first_of(fake, (200, b'{"choices": [{"index": 0, "tok')),
    "gives nothing": lambda fake: first_of(fake, (200, b"")),
}


def first_of(fake: FakeServer, answer: tuple[int, Any], times: int = 2) -> list[int]:
    """The first answers to a request for samples, then those of a server that works; counts them."""
    left = [times]

    def said(body: Any) -> Any:
        left[0] -= 1
        return answer if left[0] >= 0 else fake.inference_v1_generate(body)

    fake.answers["inference_v1_generate"] = said
    return left


@pytest.mark.parametrize("kind", PASSING)
def test_what_may_pass_is_asked_for_again_and_said(
    engine: VllmServerEngine, fake: FakeServer, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    want = engine.generate(PROMPTS, SAMPLING)
    PASSING[kind](fake)
    assert engine.generate(PROMPTS, SAMPLING) == want
    said = [record.message for record in caplog.records if "sent again in" in record.message]
    assert len(said) == 1 and "(try 1 of 2)" in said[0]  # one line for all requests of that moment


@pytest.mark.parametrize("kind", PASSING)
def test_what_does_not_pass_ends_with_what_to_do(engine: VllmServerEngine, fake: FakeServer, kind: str) -> None:
    PASSING[kind](fake)
    fake.drop, fake.halve = fake.drop * 100, fake.halve * 100
    if "inference_v1_generate" in fake.answers:
        said = fake.answers["inference_v1_generate"](PROMPTS)
        first_of(fake, said, 100)
    with pytest.raises(RolloutServerError, match=r"--resume|with 500: .*out of memory|with 50[23]|with 429|serve"):
        engine.generate(PROMPTS, SAMPLING)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_final(engine: VllmServerEngine, fake: FakeServer, status: int) -> None:
    left = first_of(fake, (status, {"error": {"message": "not so"}}), 100)
    with pytest.raises(RolloutServerError):
        engine.generate(PROMPTS[:1], SAMPLING)
    assert left == [99]


def test_a_time_out_is_not_waited_for_again(engine: VllmServerEngine, fake: FakeServer) -> None:
    free, asked = threading.Event(), []
    fake.answers["inference_v1_generate"] = lambda body: (asked.append(1), free.wait(20), (200, {}))[2]
    engine._timeout = 0.2
    with pytest.raises(RolloutServerError, match=r"within 0\.2 seconds \(rollout\.timeout\)"):
        engine.generate(PROMPTS[:1], SAMPLING)
    free.set()
    assert asked == [1]


def test_a_server_that_is_away_for_a_moment(
    engine: VllmServerEngine, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is refused once: another process behind the same address takes over."""
    want, real, tries = engine.generate(PROMPTS, SAMPLING), engine._client.port, []

    def make(host: str, port: int, timeout: float) -> Any:
        tries.append(port)
        return vllm_client.http.client.HTTPConnection(host, 1 if len(tries) == 1 else real, timeout=timeout)

    monkeypatch.setattr(engine._client, "_make", make)
    assert engine.generate(PROMPTS, SAMPLING) == want and tries[0] == real


Choices = list[dict[str, Any]]
ANSWERS: dict[str, tuple[Callable[[Choices], Choices], str]] = {
    "one sample twice": (lambda c: [c[0], c[0]], r"samples \[1, 1\], where 0 to 1 were asked for"),
    "another's number": (lambda c: [c[0], c[1] | {"index": 5}], r"samples \[1, 5\]"),
    "a negative id": (lambda c: [with_token(one, -1) for one in c], "token ids from -1 to"),
    "an id above": (lambda c: [with_token(one, 49152) for one in c], "to 49152, and the model has 0 to 49151"),
    "too long": (lambda c: [longer(one) for one in c], "40 tokens, where at most 32 were asked for"),
    "NaN": (lambda c: [with_logprob(one, NAN) for one in c], "not finite"),
    "infinity": (lambda c: [with_logprob(one, math.inf) for one in c], "not finite"),
    "above 0": (lambda c: [with_logprob(one, 3.0) for one in c], "none is above 0"),
    "None": (lambda c: [with_logprob(one, None) for one in c], "not known"),
    "a text instead": (lambda c: [with_logprob(one, "-0.5x") for one in c], "not known"),
}


def with_token(choice: dict[str, Any], token: int) -> dict[str, Any]:
    choice = copy.deepcopy(choice)
    choice["token_ids"][1] = choice["logprobs"]["content"][1]["token_id"] = token
    return choice


def with_logprob(choice: dict[str, Any], value: Any) -> dict[str, Any]:
    choice = copy.deepcopy(choice)
    choice["logprobs"]["content"][1]["logprob"] = value
    return choice


def longer(choice: dict[str, Any]) -> dict[str, Any]:
    content = choice["logprobs"]["content"]
    return choice | {
        "token_ids": choice["token_ids"][:1] * 40,
        "logprobs": {"content": content[:1] * 40},
    }


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_servers_answer_that_is_no_sample_is_refused_with_its_row(
    engine: VllmServerEngine, fake: FakeServer, kind: str
) -> None:
    change, message = ANSWERS[kind]
    sampling, scale = replace(SAMPLING, max_tokens=32), engine.scale
    sample(engine, PROMPTS, sampling, scale, NAMES)

    def said(body: Any) -> Any:
        status, answer = fake.inference_v1_generate(body)
        return status, {"choices": change(answer["choices"])} if body["token_ids"] == PROMPTS[1] else answer

    fake.answers["inference_v1_generate"] = said
    with pytest.raises((EngineError, RolloutServerError), match=message) as raised:
        sample(engine, PROMPTS, sampling, scale, NAMES)
    assert "not known" in message or "row 'row-b'" in str(raised.value)


def test_the_text_is_made_of_the_ids_whatever_a_server_calls_it(engine: VllmServerEngine, fake: FakeServer) -> None:
    want = engine.generate(PROMPTS, SAMPLING)

    def said(body: Any) -> Any:
        status, answer = fake.inference_v1_generate(body)
        return status, {"choices": [c | {"text": "So the overall score is 1"} for c in answer["choices"]]}

    fake.answers["inference_v1_generate"] = said
    assert engine.generate(PROMPTS, SAMPLING) == want


# ---- runs


class Faulty(TransformersEngine):
    """With weights of its own, as vLLM has them; does one thing wrong in its `at`th call, counted from 0."""

    wrong: Any = None
    what, at = "generate", 2

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model, self.calls = copy.deepcopy(self.model), {"generate": 0, "sync": 0}

    def _now(self, what: str) -> bool:
        now = self.wrong is not None and what == self.what and self.calls[what] == self.at
        self.calls[what] += 1
        return now

    def generate(self, prompts: Any, sampling: Any) -> Any:
        now = self._now("generate")
        found = super().generate(prompts, sampling)
        return self.wrong(found) if now else found

    def sync(self, named_tensors: Any) -> None:
        if self._now("sync"):
            tensors = iter(named_tensors)
            next(tensors)
            return self.wrong(tensors)
        super().sync(named_tensors)


def raises(_: Any) -> Any:
    raise RuntimeError("EngineCore died unexpectedly")


def nan(found: list[list[Rollout]]) -> list[list[Rollout]]:
    found[1][0].sampled_logprobs[0] = NAN
    return found


def shifted(found: list[list[Rollout]]) -> list[list[Rollout]]:
    for r in (r for group in found for r in group):
        r.sampled_logprobs = [x - 0.5 for x in r.sampled_logprobs]
    return found


RUN = ["--rollout.max_tokens", "8", "--rollout.check_every", "1", "--eval.bootstrap", "10", "--warmup.steps", "0"]
RUN += ["--save.every", "0", "--train.steps", "4", "--eval.every", "3", "--optim.lr_warmup_steps", "0"]
RUN += ["--optim.lr", "3e-3", "--save.keep", "9"]
# What is wrong, in which of the engine's calls, what the run says, and the updates that are kept. The first sync is at
# the start, the second in front of the first update; the evaluation is the fourth call of generate.
FAULTS: dict[str, tuple[Any, str, int, str, int]] = {
    "dies": (raises, "generate", 2, r"engine transformers failed .* \(RuntimeError: EngineCore died", 2),
    "dies in an evaluation": (raises, "generate", 3, r"engine transformers failed .* EngineCore died", 3),
    "dies in a sync": (raises, "sync", 2, "took the trainer's weights over .* EngineCore died", 1),
    "gives NaN": (nan, "generate", 2, "rollout 0: the rollout engine .* is not finite", 2),
    "gives another's log-probabilities": (shifted, "generate", 2, "the rollout engine and the trainer disagree", 2),
    "gives groups in another order": (lambda found: found[::-1], "generate", 2, "engine and the trainer disagree", 2),
    "misses a sync": (lambda tensors: [*tensors].clear(), "sync", 2, "engine and the trainer disagree", 1),
}


@pytest.fixture(scope="module")
def undisturbed(golden_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_engine", made)
        assert main(run_flags(golden_model, output, *RUN)) == 0
    return output


def made(config: Any, model: Any, tokenizer: Any, scale: Any, *_: Any) -> Faulty:
    return Faulty(model, tokenizer, scale, dtype=torch.float32)


@pytest.mark.e2e
@pytest.mark.parametrize("kind", FAULTS)
def test_a_run_whose_engine_fails_keeps_its_updates_and_ends_as_the_undisturbed_one(
    golden_model: Path, undisturbed: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, kind: str
) -> None:
    wrong, what, at, message, kept = FAULTS[kind]
    monkeypatch.setattr(setup, "make_engine", made)
    monkeypatch.setattr(Faulty, "what", what)
    monkeypatch.setattr(Faulty, "at", at)
    monkeypatch.setattr(Faulty, "wrong", staticmethod(wrong))
    output = tmp_path / "run"
    assert main(run_flags(golden_model, output, *RUN)) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert f"step-{kept:06d} is kept: go on with --resume" in said
    assert len(metric_lines(output)) == kept
    monkeypatch.setattr(Faulty, "wrong", None)
    if kind.startswith("dies") or "sync" in kind:
        assert main(run_flags(golden_model, output, *RUN, "--resume")) == 0
        assert same_weights(output, undisturbed) and metric_lines(output) == metric_lines(undisturbed)


@pytest.mark.e2e
def test_ctrl_c_in_an_evaluation_loses_no_update(
    golden_model: Path, undisturbed: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(setup, "make_engine", made)
    evaluated = held_out.evaluate

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return evaluated(*args, **kwargs)

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(held_out, "evaluate", interrupted)
        assert main(run_flags(golden_model, output, *RUN, "--eval.on_start", "false")) == 130
    assert "stopped after step 3; step-000003 is kept" in capsys.readouterr().err
    assert main(run_flags(golden_model, output, *RUN, "--resume")) == 0
    assert same_weights(output, undisturbed) and metric_lines(output) == metric_lines(undisturbed)


@pytest.mark.e2e
def test_before_the_first_checkpoint_there_is_nothing_to_keep(
    golden_model: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """A failing evaluation in front of the warm-up must not leave a checkpoint that says the warm-up is done."""
    monkeypatch.setattr(setup, "make_engine", made)
    monkeypatch.setattr(Faulty, "at", 0)
    monkeypatch.setattr(Faulty, "wrong", staticmethod(raises))
    more = ["--eval.on_start", "true", "--warmup.steps", "1"]
    assert main(run_flags(golden_model, tmp_path / "run", *RUN, *more)) == 2
    assert "no checkpoint yet: --resume starts over" in capsys.readouterr().err


@pytest.mark.e2e
def test_a_checkpoint_that_cannot_be_written_does_not_hide_the_engines_error(
    golden_model: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    from real_fast.errors import CheckpointError
    from real_fast.training.saving import Saver

    monkeypatch.setattr(setup, "make_engine", made)
    monkeypatch.setattr(Faulty, "wrong", staticmethod(raises))
    saved = Saver.checkpoint

    def full(self: Saver, state: Any, files: Any) -> None:
        if state.step:
            raise CheckpointError("the disk is full")
        saved(self, state, files)

    monkeypatch.setattr(Saver, "checkpoint", full)
    assert main(run_flags(golden_model, tmp_path / "run", *RUN)) == 2
    said = capsys.readouterr().err
    assert "the disk is full" in said and "EngineCore died" in said and "step-000000 is kept" in said


def on_ranks(argv: list[str], kind: str) -> Any:
    """A run on ranks of which one has an engine that fails."""
    on_main = kind == "the server's sync"

    def engine(config: Any, model: Any, tokenizer: Any, scale: Any, path: Any, world: Ranks) -> Any:
        if on_main and not world.is_main:
            return MainEngine(None, world, "main", torch.float32)
        found = Faulty(make._copy(config, model, path), tokenizer, scale, dtype=torch.float32)
        if kind and world.rank == (0 if on_main else 1):
            found.wrong, found.what = raises, "sync" if "sync" in kind else "generate"
        return MainEngine(found, world, "main", torch.float32) if on_main else SpreadEngine(found, world)

    kept, setup.make_engine = setup.make_engine, engine
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            status = main(argv)
    finally:
        setup.make_engine = kept
    return status, said.getvalue()


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ["one rank's samples", "one rank's sync", "the server's sync"])
def test_an_engine_that_fails_on_one_rank_ends_all_with_a_checkpoint(
    tiny_judge: Path, tmp_path: Path, kind: str
) -> None:
    more = ["--warmup.steps", "0", "--save.every", "0", "--train.steps", "3"]
    argv = flags(tiny_judge, tmp_path / "run", *more)
    found = run_ranks(2, on_ranks, argv, kind, group=False, timeout=120)
    assert [status for status, _ in found] == [2, 2], found
    assert "EngineCore died" in "".join(said for _, said in found)
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())][-1] != "step-000000"
    assert not (tmp_path / "run" / "final").exists()


@given(seed=st.integers(0, 2**32), odd=st.sampled_from((0.0, 0.05, 0.3)))
def test_all_numbers_at_once_are_refused_where_one_at_a_time_would_be(seed: int, odd: float) -> None:
    draw = Random(seed)
    ids = [
        [draw.choice((-1, 100, 10**30)) if draw.random() < odd else draw.randrange(100) for _ in range(3)]
        for _ in range(4)
    ]
    strange = (NAN, math.inf, -math.inf, 0.005, 0.02, -1e308)
    logprobs = [[draw.choice(strange) if draw.random() < odd else -draw.random() for _ in range(3)] for _ in range(4)]
    rollouts = [
        Rollout(some, numbers, [*some, 60], 1, "phrase", [-2.0] * len(SCALE.values), None)
        for some, numbers in zip(ids, logprobs, strict=True)
    ]
    said = []
    for at_once in (checked._all_usual, lambda *_: False):
        with patch.object(checked, "_all_usual", at_once):
            try:
                check([rollouts], SimpleNamespace(name="fixed", vocabulary=100), 1, SamplingParams(4, 3), SCALE)
                said.append("")
            except EngineError as error:
                said.append(str(error))
    assert said[0] == said[1]
