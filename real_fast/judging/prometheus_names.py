"""Grading under the names that prometheus-eval gave it: absolute, and relative out of two absolute grades."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from real_fast.errors import ConfigError
from real_fast.judging.arguments import known_arguments
from real_fast.judging.grade import Grade, Rubric, raise_if_ungraded, request
from real_fast.score.scale import ScoreScale
from real_fast.types import SamplingParams

# There, `params` go to vLLM whole; these are the ones under which a score distribution means the same.
_PARAMS = ("temperature", "top_p", "max_tokens", "n", "seed")
# Understood where they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1, None), "top_k": (0, -1), "min_p": (0,), "use_tqdm": (True, False),
    "repetition_penalty": (1,), "presence_penalty": (0,), "frequency_penalty": (0,),
}  # fmt: skip
# Part of what prometheus-eval sends by default, and passed over with a warning where they would change something.
_NOT_APPLIED = ("repetition_penalty", "presence_penalty", "frequency_penalty")
# Scores that differ by no more than this share of the scale's range are a tie: rounding alone makes such differences.
TIE = 0.01

Verdict = Literal["A", "B", "tie"]


class PrometheusNames(ABC):
    """prometheus-eval's calls on top of a batch of rows.

    Scores are expected scores, so not whole numbers. Where a single text is asked for, a tuple or list of one is taken
    as that text: a comma behind an assignment makes one, as in prometheus-eval's own examples.
    """

    scale: ScoreScale

    @abstractmethod
    def _sampling(self, seed: int) -> SamplingParams: ...

    @abstractmethod
    def _grade(self, rows: Sequence[Any], params: SamplingParams) -> list[Grade]: ...

    @known_arguments
    def single_absolute_grade(
        self,
        instruction: str,
        response: str,
        rubric: Rubric,
        reference_answer: str | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> tuple[str | list[str] | None, float | None]:
        """Feedback and score of one response.

        Args:
            instruction: What the response answers.
            response: The text to grade.
            rubric: Text, or Prometheus's dictionary.
            reference_answer: None for none.
            params: temperature, top_p (with vLLM, the judge's own is the smallest), max_tokens, n and seed.

        Raises:
            GradeError: The request cannot be graded.
            JudgeError: The engine failed at it.
            ConfigError: A key of `params` that is not understood, or a value that cannot be.
        """
        row = request(*map(_single, (instruction, response, rubric, reference_answer)))
        grade = raise_if_ungraded(self._grade([row], self._with(params))[0])
        if said := grade.error or grade.warning:
            warnings.warn(said, stacklevel=3)
        return grade.feedback, grade.score

    @known_arguments
    def absolute_grade(
        self,
        *,
        instructions: Sequence[str],
        responses: Sequence[str],
        rubric: Rubric | Sequence[Rubric],
        reference_answers: Sequence[str | None] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> tuple[list[str | list[str] | None], list[float | None]]:
        """Feedbacks and scores of many responses. A row without a score has None, and a warning says why.

        Args:
            instructions: One per response.
            responses: The texts to grade.
            rubric: One for all, or one per response.
            reference_answers: One per response, or None.
            params: As of :meth:`single_absolute_grade`.

        Raises:
            ValueError: The lists have different lengths.
            ConfigError: A key of `params` that is not understood, or a value that cannot be.
        """
        rows = _rows(instructions, responses, rubric, reference_answers)
        grades = self._grade(rows, self._with(params))
        for place, grade in enumerate(grades):
            if grade.error:
                warnings.warn(f"response {place} has no score: {grade.error}", stacklevel=3)
            elif grade.warning:
                warnings.warn(f"response {place}: {grade.warning}", stacklevel=3)
        return [grade.feedback for grade in grades], [grade.score for grade in grades]

    @known_arguments
    def single_relative_grade(
        self,
        instruction: str,
        response_A: str,
        response_B: str,
        rubric: Rubric,
        reference_answer: str | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> tuple[str | None, Verdict | None]:
        """Feedback on two responses to one instruction, and which is better: see :meth:`relative_grade`.

        Raises:
            GradeError: One of the two cannot be graded.
            JudgeError: The engine failed at one.
            ConfigError: As of :meth:`single_absolute_grade`.
        """
        texts = [_single(text) for text in (instruction, rubric, reference_answer)]
        pair = [request(texts[0], _single(response), *texts[1:]) for response in (response_A, response_B)]
        a, b = (raise_if_ungraded(grade) for grade in self._grade(pair, replace(self._with(params), alone=True)))
        return self._relative(a, b, 0)

    @known_arguments
    def relative_grade(
        self,
        *,
        instructions: Sequence[str],
        responses_A: Sequence[str],
        responses_B: Sequence[str],
        rubric: Rubric | Sequence[Rubric],
        reference_answers: Sequence[str | None] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> tuple[list[str | None], list[Verdict | None]]:
        """Feedbacks on pairs of responses, and which of each is better: "A", "B" or "tie".

        Each response is graded by itself, with the random numbers that it has alone, and the higher score wins. So the
        order of a pair means nothing: with A and B in the other order, the verdict is the other one. Scores closer
        than :data:`TIE` of the scale's range are a tie. The feedback holds both responses' with their scores. A pair
        with a response that has no score has None, and a warning says why.

        Args:
            instructions: One per pair.
            responses_A: The first responses.
            responses_B: The second responses.
            rubric: One for all, or one per pair.
            reference_answers: One per pair, or None.
            params: As of :meth:`single_absolute_grade`.

        Raises:
            ValueError: The lists have different lengths.
            ConfigError: As of :meth:`single_absolute_grade`.
        """
        sides = [_rows(instructions, responses, rubric, reference_answers) for responses in (responses_A, responses_B)]
        grades = self._grade([*sides[0], *sides[1]], replace(self._with(params), alone=True))
        half = len(sides[0])
        feedbacks: list[str | None] = []
        verdicts: list[Verdict | None] = []
        for pair, (a, b) in enumerate(zip(grades[:half], grades[half:], strict=True)):
            feedback, verdict = self._relative(a, b, pair)
            feedbacks.append(feedback)
            verdicts.append(verdict)
        return feedbacks, verdicts

    def _relative(self, a: Grade, b: Grade, pair: int) -> tuple[str | None, Verdict | None]:
        for name, grade in (("A", a), ("B", b)):
            if said := grade.error or grade.warning:
                warnings.warn(f"response {name} of pair {pair}: {said}", stacklevel=4)
        if a.score is None or b.score is None:
            return None, None
        texts = [
            grade.feedback if isinstance(grade.feedback, str) else "\n".join(grade.feedback or ()) for grade in (a, b)
        ]
        feedback = f"Response A ({a.score:.2f}): {texts[0]}\nResponse B ({b.score:.2f}): {texts[1]}"
        if abs(a.score - b.score) <= TIE * self.scale.span:
            return feedback, "tie"
        return feedback, "A" if a.score > b.score else "B"

    def _with(self, params: Mapping[str, Any] | None) -> SamplingParams:
        given = {k: v for k, v in (params or {}).items() if v not in _NEUTRAL.get(k, ())}
        for key in [key for key in _NOT_APPLIED if key in given]:
            warnings.warn(
                f"params has {key}: {given.pop(key)}, which is not applied: it would change the probabilities that the "
                "score is read from, a digit of the prompt's losing some. Leave it out to be rid of this warning",
                stacklevel=4,
            )
        if unknown := sorted(set(given) - set(_PARAMS)):
            raise ConfigError(
                f"params has {unknown[0]!r}: {given[unknown[0]]!r}, and a judge understands {', '.join(_PARAMS)}: "
                "leave it out"
            )
        sampling_params = replace(self._sampling(0), **given)
        whole = all(
            isinstance(value, int) for value in (sampling_params.n, sampling_params.max_tokens, sampling_params.seed)
        )
        if (
            not whole
            or sampling_params.n < 1
            or sampling_params.max_tokens < 1
            or sampling_params.temperature < 0
            or not 0 < sampling_params.top_p <= 1
        ):
            raise ConfigError(
                f"params {given}: n and max_tokens must be 1 or more, temperature 0 or more, top_p above 0 and at most "
                "1, seed a whole number"
            )
        return sampling_params


def _single(text: Any) -> Any:
    return text[0] if isinstance(text, tuple | list) and len(text) == 1 else text


def _rows(
    instructions: Sequence[str],
    responses: Sequence[str],
    rubric: Rubric | Sequence[Rubric],
    reference_answers: Sequence[str | None] | None,
) -> list[dict[str, Any]]:
    """A row of judge data for each response. Raises ValueError for lists of different lengths, or no lists at all."""
    lists = {"instructions": instructions, "responses": responses, "reference_answers": reference_answers}
    for name, given in lists.items():
        if isinstance(given, str):
            raise ValueError(f"{name} is one text: give a list, or call the single_ method")
    rubrics = [rubric] * len(responses) if isinstance(rubric, str | Mapping) else list(rubric)
    rubrics = rubrics * len(responses) if isinstance(rubric, tuple) and len(rubrics) == 1 else rubrics
    answers = [None] * len(responses) if reference_answers is None else list(reference_answers)
    if not len(instructions) == len(responses) == len(rubrics) == len(answers):
        raise ValueError(
            f"the lengths differ: {len(instructions)} instructions, {len(responses)} responses, {len(rubrics)} "
            f"rubrics, {len(answers)} reference answers"
        )
    return [request(*map(_single, texts)) for texts in zip(instructions, responses, rubrics, answers, strict=True)]
