"""The module that stands in for the package prometheus-eval: examples as its readers have them, pasted."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from real_fast import GradeError, Judge
from real_fast.errors import ConfigError
from real_fast.judging.prometheus_eval import SCORE_RUBRIC_TEMPLATE, VLLM, PrometheusEval
from tests.judging.fakes import FakeEngine, rollout

# Calls and names as in that package's README: the commas behind the texts make tuples of them.
ABSOLUTE = """
from real_fast.judging.prometheus_eval import VLLM
from real_fast.judging.prometheus_eval import PrometheusEval
from real_fast.judging.prometheus_eval import ABSOLUTE_PROMPT, SCORE_RUBRIC_TEMPLATE

model = VLLM(model=MODEL)
judge = PrometheusEval(model=model, absolute_grade_template=ABSOLUTE_PROMPT)

instruction = "A friend lost the job and asks what to do next.",
response = "I am sorry. Rest for a day, then write to three people whom you know.",
reference_answer = "That is hard. Give yourself time, and ask people whom you trust.",

rubric_data = {
  "criteria": "Does the answer show empathy?",
  "score1_description": "None at all.",
  "score2_description": "Little.",
  "score3_description": "Some.",
  "score4_description": "Much.",
  "score5_description": "Throughout.",
}

score_rubric = SCORE_RUBRIC_TEMPLATE.format(**rubric_data)

feedback, score = judge.single_absolute_grade(
    instruction=instruction,
    response=response,
    rubric=score_rubric,
    reference_answer=reference_answer,
)

print("Feedback:", feedback)
print("Score:", score)

instructions = [instruction, "Name a fruit."]
responses = [response, "A pear."]
reference_answers = [reference_answer, "An apple."]
feedbacks, scores = judge.absolute_grade(
    instructions=instructions,
    responses=responses,
    rubric=score_rubric,
    reference_answers=reference_answers,
    params={},
)
"""
RELATIVE = """
from real_fast.judging.prometheus_eval import VLLM, PrometheusEval, RELATIVE_PROMPT

model = VLLM(model=MODEL)
judge = PrometheusEval(model_id=MODEL, relative_grade_template=RELATIVE_PROMPT)

data = {
  "instruction": "Why did Rome fall?",
  "response_A": "It was the economy.",
  "response_B": "It was the economy, as Harper (2016) shows.",
  "reference_answer": "The economy: see Harper (2016).",
  "rubric": "Is the answer supported by citations?"
}

feedback, score = judge.single_relative_grade(**data)

print("Feedback:", feedback)
print("Score:", score)
"""


def run(code: str, model: Path) -> dict[str, Any]:
    names: dict[str, Any] = {"MODEL": str(model)}
    exec(textwrap.dedent(code), names)
    return names


@pytest.fixture
def model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Few tokens, and this machine's Transformers."""
    monkeypatch.setattr(
        "real_fast.judging.prometheus_eval._ROLLOUT", {"max_tokens": 5, "top_p": 0.9, "engine": "transformers"}
    )
    return folder


def test_its_examples_run_pasted(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(ABSOLUTE.replace("model=MODEL", "model=MODEL, prompt={'max_tokens': 500}"), model)
    assert isinstance(names["feedback"], str) and 1 <= names["score"] <= 3
    assert len(names["feedbacks"]) == len(names["scores"]) == 2 and names["scores"][0] == pytest.approx(names["score"])
    assert names["score_rubric"].startswith("[Does the answer show empathy?]\nScore 1: None at all.\nScore 2: Little.")
    assert "Score: " in capsys.readouterr().out
    pair = run(RELATIVE.replace("model_id=MODEL", "VLLM(MODEL, prompt={'max_tokens': 500})"), model)
    assert pair["score"] in ("A", "B", "tie") and "Response B (" in pair["feedback"]


def test_trailing_commas_leave_no_trace_in_the_prompt(with_engine: Callable[..., Judge]) -> None:
    engine = FakeEngine([rollout([0.5, 0.25, 0.25])])
    judge = PrometheusEval(with_engine(engine))
    plain = judge.single_absolute_grade("a", "b", "c", "d")
    assert judge.single_absolute_grade(("a",), ("b",), ("c",), ("d",)) == plain  # type: ignore[arg-type]
    judge.absolute_grade(instructions=[("a",)], responses=[("b",)], rubric=("c",), reference_answers=[("d",)])  # type: ignore[list-item]
    assert engine.calls[0][0] == engine.calls[1][0] == engine.calls[2][0]
    with pytest.raises(ValueError, match="instructions is one text: give a list"):
        judge.absolute_grade(instructions="abc", responses=["x", "y", "z"], rubric="r")


def test_its_own_default_parameters_are_taken_and_the_penalty_explained(with_engine: Callable[..., Judge]) -> None:
    engine = FakeEngine([rollout([0.5, 0.25, 0.25])])
    judge = PrometheusEval(with_engine(engine))
    default = {"max_tokens": 1024, "repetition_penalty": 1.03, "best_of": 1, "temperature": 1.0, "top_p": 0.9}
    with pytest.warns(UserWarning, match=r"repetition_penalty: 1\.03, which is not applied: .* Leave it out") as said:
        _, score = judge.single_absolute_grade("a", "b", "c", params=default)
    assert score == pytest.approx(1.75) and said[0].filename == __file__
    assert (engine.calls[0][1].max_tokens, engine.calls[0][1].top_p) == (1024, 0.9)
    with pytest.raises(ConfigError, match=r"params has 'min_p': 0\.1, and a judge understands"):
        judge.single_absolute_grade("a", "b", "c", params={"min_p": 0.1, "presence_penalty": 0})


class ByText(FakeEngine):
    """The more often a prompt holds "good", the better."""

    def generate(self, prompts: Any, sampling: Any) -> Any:
        super().generate(prompts, sampling)
        assert sampling.alone
        texts = [self.tokenizer.decode(ids) for ids in prompts]
        return [[rollout([0.9 - 0.2 * t.count("good"), 0.1, 0.2 * t.count("good") + 1e-9])] for t in texts]


@pytest.fixture
def by_text(with_engine: Callable[..., Judge], small_tokenizer: Any) -> PrometheusEval:
    engine = ByText([])
    engine.tokenizer = small_tokenizer
    return PrometheusEval(with_engine(engine))


def test_the_better_of_two_in_either_order(by_text: PrometheusEval) -> None:
    good, poor = "A good one.", "One."
    feedback, verdict = by_text.single_relative_grade("a", good, poor, "r", "ref")
    other, reverse = by_text.single_relative_grade("a", poor, good, "r", "ref")
    assert (verdict, reverse) == ("A", "B")
    assert feedback == "Response A (1.50): Good.\nResponse B (1.10): Good."
    assert other == "Response A (1.10): Good.\nResponse B (1.50): Good."
    _, verdicts = by_text.relative_grade(
        instructions=["a"] * 3, responses_A=[poor, good, poor], responses_B=[good, good, poor], rubric="r"
    )
    assert verdicts == ["B", "tie", "tie"]


def test_a_pair_without_a_score_has_no_verdict(by_text: PrometheusEval) -> None:
    with pytest.warns(UserWarning, match="response B of pair 1: response is empty"):
        feedbacks, verdicts = by_text.relative_grade(
            instructions=["a", "a"], responses_A=["good", "x"], responses_B=["x", ""], rubric=["r", "r"]
        )
    assert verdicts == ["A", None] and feedbacks[1] is None
    with pytest.raises(GradeError, match="response is empty"):
        by_text.single_relative_grade("a", "x", "", "r")
    with pytest.raises(ValueError, match="the lengths differ"):
        by_text.relative_grade(instructions=["a"], responses_A=["x", "y"], responses_B=["x"], rubric="r")


def test_a_model_is_asked_as_it_was_trained(folder: Path, tiny_judge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of its README has no settings of ours: Prometheus's prompt, and the score behind [RESULT]."""
    monkeypatch.setattr("real_fast.judging.judge.load_engine", lambda *_: FakeEngine([]))
    ours, theirs = (VLLM(model=str(model)).judge() for model in (folder, tiny_judge))
    assert (ours.config.prompt.template, ours.scale.phrase) == ("short", "Grade: ")
    assert (theirs.config.prompt.template, theirs.scale.phrase) == ("prometheus", "[RESULT] ")
    assert VLLM(model=str(tiny_judge), prompt={"template": "short"}).judge().config.prompt.template == "short"
    assert (theirs.config.rollout.max_tokens, theirs.config.rollout.top_p) == (1024, 0.9)


def test_what_it_does_not_have_is_said(folder: Path) -> None:
    with pytest.raises(ConfigError, match="absolute_grade_template is a text of your own"):
        PrometheusEval(VLLM(str(folder)), absolute_grade_template="Grade {response}.")
    with pytest.raises(ConfigError, match="model is None"):
        PrometheusEval()
    with pytest.raises(ConfigError, match="tensor_parallel_size is not 1"):
        VLLM(model="m", tensor_parallel_size=2)
    with pytest.raises(ConfigError, match=r"VLLM has no argument 'swap_space'.*takes device, engine"):
        VLLM(model="m", swap_space=4)
    assert VLLM("m", gpu_memory_utilization=0.5).settings["rollout"]["gpu_memory_utilization"] == 0.5
    assert SCORE_RUBRIC_TEMPLATE.count("\n") == 5
