"""A request to grade one response, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from real_fast.errors import GradeError

Rubric = str | Mapping[str, str]


@dataclass(frozen=True)
class Grade:
    """A verdict.

    Attributes:
        feedback: What the judge wrote, without the phrase and the score; a list for n > 1; None where nothing could be
            sampled.
        score: The prediction, in the scale's unit, usually between two scores; None where there is none.
        distribution: {score text: probability}, as :class:`real_fast.score.protocol.Prediction` has it.
        off_scale_mass: The model's probability outside the score tokens, where the score stands.
        decoded: Mean of the scores that the judge wrote itself, None where it wrote none.
        error: Why there is no score; None where there is one.
    """

    feedback: str | list[str] | None = None
    score: float | None = None
    distribution: dict[str, float] | None = None
    off_scale_mass: float | None = None
    decoded: float | None = None
    error: str | None = None


def request(instruction: str, response: str, rubric: Rubric, reference_answer: str | None) -> dict[str, Any]:
    """A row of judge data, without a label."""
    return {"instruction": instruction, "response": response, "rubric": rubric, "reference_answer": reference_answer}


def raise_if_ungraded(grade: Grade) -> Grade:
    """The grade, or :class:`GradeError` where nothing could be sampled."""
    if grade.error and grade.feedback is None:
        raise GradeError(grade.error)
    return grade
