"""Grading under the names that prometheus-eval gave it, so that its callers need to change the judge alone."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from real_fast.errors import ConfigError
from real_fast.judging.grade import Grade, Rubric, raise_if_ungraded, request
from real_fast.types import SamplingParams

# There, `params` go to vLLM whole; these are the ones under which a score distribution means the same.
_PARAMS = ("temperature", "top_p", "max_tokens", "n", "seed")
# Understood as long as they change nothing.
_NEUTRAL = {"best_of": 1, "repetition_penalty": 1}


class PrometheusNames(ABC):
    """``single_absolute_grade`` and ``absolute_grade`` on top of a batch of rows.

    Scores are expected scores, so not whole numbers.
    """

    @abstractmethod
    def _sampling(self, seed: int) -> SamplingParams: ...

    @abstractmethod
    def _grade(self, rows: Sequence[Any], params: SamplingParams) -> list[Grade]: ...

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
            ConfigError: A key of `params` that is not understood, or a value that cannot be.
        """
        row = request(instruction, response, rubric, reference_answer)
        grade = raise_if_ungraded(self._grade([row], self._with(params))[0])
        if said := grade.error or grade.warning:
            warnings.warn(said, stacklevel=2)
        return grade.feedback, grade.score

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
        rubrics = [rubric] * len(responses) if isinstance(rubric, str | Mapping) else list(rubric)
        answers = [None] * len(responses) if reference_answers is None else list(reference_answers)
        if not len(instructions) == len(responses) == len(rubrics) == len(answers):
            raise ValueError(
                f"the lengths differ: {len(instructions)} instructions, {len(responses)} responses, {len(rubrics)} "
                f"rubrics, {len(answers)} reference answers"
            )
        rows = [request(*texts) for texts in zip(instructions, responses, rubrics, answers, strict=True)]
        grades = self._grade(rows, self._with(params))
        for place, grade in enumerate(grades):
            if grade.error:
                warnings.warn(f"response {place} has no score: {grade.error}", stacklevel=2)
            elif grade.warning:
                warnings.warn(f"response {place}: {grade.warning}", stacklevel=2)
        return [grade.feedback for grade in grades], [grade.score for grade in grades]

    def _with(self, params: Mapping[str, Any] | None) -> SamplingParams:
        given = {k: v for k, v in (params or {}).items() if k not in _NEUTRAL or v != _NEUTRAL[k]}
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
