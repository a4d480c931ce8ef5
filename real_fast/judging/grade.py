"""A request to grade one response, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from real_fast.errors import GradeError, JudgeError
from real_fast.score.protocol import ProtocolName, read
from real_fast.score.scale import ScoreScale
from real_fast.types import Rollout

Rubric = str | Mapping[str, str]

# With the whole vocabulary's softmax, mass off the scale pulls the expected score towards 0: by so much of itself.
WARN_OFF_SCALE = 0.2  # from here on the grade says so; the training report warns there too
MAX_OFF_SCALE = 0.5  # from here on there is no score: most of the probability is on something that is none

SAMPLING_FAILED = "sampling failed"  # begins the error of a row that the engine failed at


@dataclass(frozen=True)
class Grade:
    """A verdict.

    Attributes:
        feedback: What the judge wrote, without the phrase and the score; a list for n > 1; None where nothing could be
            sampled.
        score: The prediction, in the scale's unit, usually between two scores; None where there is none, or where more
            than :data:`MAX_OFF_SCALE` of the probability is off the scale (the distribution is kept then).
        distribution: {score text: probability}, as :class:`real_fast.score.protocol.Prediction` has it.
        off_scale_mass: The model's probability outside the score tokens, where the score stands.
        decoded: Mean of the scores that the judge wrote itself, None where it wrote none.
        error: Why there is no score; None where there is one.
        warning: What speaks against the score: more than :data:`WARN_OFF_SCALE` of the probability is off the scale.
    """

    feedback: str | list[str] | None = None
    score: float | None = None
    distribution: dict[str, float] | None = None
    off_scale_mass: float | None = None
    decoded: float | None = None
    error: str | None = None
    warning: str | None = None


def request(instruction: str, response: str, rubric: Rubric, reference_answer: str | None) -> dict[str, Any]:
    """A row of judge data, without a label."""
    return {"instruction": instruction, "response": response, "rubric": rubric, "reference_answer": reference_answer}


def doubt(off_scale_mass: float | None, full_softmax: bool) -> tuple[str | None, str | None]:
    """What the probability off the scale says against a score: (error, warning), each None where there is none.

    Args:
        off_scale_mass: The model's probability outside the score tokens; None where it was not read.
        full_softmax: Whether that probability is missing from the score. Where the scores' own softmax was taken, the
            score lies on the scale whatever the rest, and there is a warning at most.
    """
    if off_scale_mass is None or not off_scale_mass > WARN_OFF_SCALE:
        return None, None
    what = f"{off_scale_mass:.4g} of the probability lies outside the scores"
    if not full_softmax:
        return None, f"{what}: the score is read from the little that is left"
    if off_scale_mass > MAX_OFF_SCALE:
        return f"no score: {what}, and at most {MAX_OFF_SCALE} may (is this the model's own phrase and scale?)", None
    return None, f"{what}, which pulls the score towards 0"


def verdict(rollouts: Sequence[Rollout], scale: ScoreScale, protocol: ProtocolName, renormalize: bool) -> Grade:
    """The grade of a response out of the feedbacks on it. Arguments as of :func:`real_fast.score.protocol.read`."""
    found = read(rollouts, scale, protocol, renormalize)
    # A score that the model wrote says nothing of the probability that was left for others.
    error, warning = doubt(None if protocol == "decode" else found.off_scale_mass, full_softmax=not renormalize)
    if found.prediction is None:
        error, warning = "no score: none of the feedbacks has one", None
    texts = [r.text.rstrip().removesuffix(scale.phrase.strip()).strip() for r in rollouts]
    return Grade(
        feedback=texts[0] if len(texts) == 1 else texts,
        score=None if error else found.prediction,
        distribution=found.distribution,
        off_scale_mass=found.off_scale_mass,
        decoded=found.decoded,
        error=error,
        warning=warning,
    )


def raise_if_ungraded(grade: Grade) -> Grade:
    """The grade, where there is a feedback.

    Raises:
        GradeError: The request cannot be graded.
        JudgeError: The engine failed at it.
    """
    if grade.error and grade.feedback is None:
        raise (JudgeError if grade.error.startswith(SAMPLING_FAILED) else GradeError)(grade.error)
    return grade
