"""From a raw record to a judge row: the field names that datasets use, and what makes a record unusable."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from typing import Any

from real_fast.errors import RowError
from real_fast.score.scale import ScoreScale, format_score
from real_fast.score.verdict import cut_verdict
from real_fast.types import JudgeRow, JudgeTexts

# In a Prometheus record, "instruction" is a whole judge prompt and "output" a whole verdict: orig_* comes first.
PROMETHEUS = {
    "instruction": "orig_instruction",
    "response": "orig_response",
    "reference_answer": "orig_reference_answer",
    "rubric": "orig_criteria",
    "score": "orig_score",
    "feedback": "orig_feedback",
}
ALIASES = {
    "instruction": ("instruction", "prompt", "input"),
    "response": ("response", "output", "completion"),
    "reference_answer": ("reference_answer", "reference"),
    "rubric": ("rubric", "criteria", "score_rubric"),
    "score": ("score", "label", "human_score"),
    "feedback": ("feedback", "feedbacks"),
}
_RUBRIC_KEY = re.compile(r"(?:score)?[ _]?(\d+(?:\.\d+)?)(?:[ _]?description)?")


def instruction_key(instruction: str) -> str:
    """A stable 16-digit key of an instruction that ignores how its white space is laid out."""
    return hashlib.sha256(" ".join(instruction.split()).encode()).hexdigest()[:16]


def parse_row(record: Any, row_id: str, scale: ScoreScale, needs_rubric: bool) -> JudgeRow:
    """Read a record.

    Args:
        record: A mapping with the fields of :data:`PROMETHEUS` or :data:`ALIASES`, and optionally id, prompt_id and
            scores (each rater's, in the order of feedbacks; their mean is the label where there is no other).
        row_id: Id of a record that has none.
        scale: Labels must lie on it; its phrase and a score at the end of a feedback are cut off.
        needs_rubric: Whether a record without a rubric is unusable.

    Raises:
        RowError: What is missing, not text, not a number or off the scale.
    """
    texts = parse_texts(record, needs_rubric)
    label = _label(record, scale)
    feedbacks, feedback_labels = _feedbacks(record, label, scale)
    given_id, prompt_id = record.get("id"), record.get("prompt_id")
    return JudgeRow(
        id=row_id if given_id in (None, "") else str(given_id),
        prompt_id=instruction_key(texts.instruction) if prompt_id in (None, "") else str(prompt_id),
        **vars(texts),
        label=label,
        feedbacks=feedbacks,
        feedback_labels=feedback_labels,
    )


def parse_texts(record: Any, needs_rubric: bool) -> JudgeTexts:
    """Read the texts of a record, which needs no label. Arguments and errors as of :func:`parse_row`."""
    if not isinstance(record, Mapping):
        raise RowError(f"not an object: {type(record).__name__}")
    instruction = _text(record, "instruction", required=True)
    response = _text(record, "response", required=True)
    rubric = _rubric(record)
    if needs_rubric and not rubric:
        raise RowError(f"rubric is missing: the template uses it, and there is none of {_names('rubric')}")
    return JudgeTexts(instruction, response, rubric, _text(record, "reference_answer", required=False))


def _names(name: str) -> str:
    return ", ".join((PROMETHEUS[name], *ALIASES[name]))


def _find(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field under whichever name it has, None where there is none."""
    orig = PROMETHEUS[name]
    if record.get(orig) not in (None, ""):
        return record[orig]
    if name in ("instruction", "response") and any(PROMETHEUS[n] in record for n in ("instruction", "response")):
        return None
    found = {alias: record[alias] for alias in ALIASES[name] if record.get(alias) not in (None, "")}
    if len({str(number(value) if name == "score" else value) for value in found.values()}) > 1:
        raise RowError(f"two fields for the {name}: {' and '.join(found)} differ, so keep or rename one")
    return next(iter(found.values()), None)


def _checked(value: Any, name: str) -> str:
    """`value`, if it is text that a tokenizer can take."""
    if not isinstance(value, str):
        raise RowError(f"{name} is not text: {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{name} is not valid Unicode: {error.reason} at character {error.start}") from error
    return value


def _text(record: Mapping[str, Any], name: str, required: bool) -> str:
    value = _find(record, name)
    text = "" if value is None else _checked(value, name)
    if required and not text.strip():
        raise RowError(f"{name} is missing or empty: there is none of {_names(name)}")
    return text


def _rubric(record: Mapping[str, Any]) -> str:
    value = _find(record, "rubric")
    if isinstance(value, Mapping):
        return _rubric_lines(value.get("criteria"), {k: v for k, v in value.items() if k != "criteria"})
    prefix = "orig_" if record.get("orig_criteria") is not None else ""
    described = rf"{prefix}score[\d.]+_description"
    scores = {k[len(prefix) :]: v for k, v in record.items() if re.fullmatch(described, str(k))}
    text = "" if value is None else _checked(value, "rubric")
    return _rubric_lines(text, scores) if scores else text.strip()


def _rubric_lines(criteria: Any, scores: Mapping[str, Any]) -> str:
    """A rubric given in parts: "[criteria]" and a line per score, lowest score first."""
    described: dict[float, str] = {}
    for key, text in scores.items():
        if text is None or text == "":
            continue
        match = _RUBRIC_KEY.fullmatch(str(key).lower())
        if match is None:
            raise RowError(f"rubric has an unknown key: {str(key)[:40]!r} is not criteria or score1_description")
        described[float(match[1])] = _checked(text, f"rubric's {key}").strip()
    lines = [f"Score {format_score(score)}: {text}" for score, text in sorted(described.items())]
    if criteria:
        lines.insert(0, f"[{_checked(criteria, 'rubric').strip()}]")
    return "\n".join(lines)


def number(value: Any) -> float | None:
    """A finite number, given as such or as text; None for anything else, booleans included."""
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal, str)):
        return None
    if isinstance(value, str) and "_" in value:
        return None
    try:
        result = float(value)
    except (ValueError, OverflowError):
        return None
    return result if math.isfinite(result) else None


def _score(value: Any, name: str, scale: ScoreScale) -> float:
    result = number(value)
    if result is None:
        raise RowError(f"{name} is not a number: {str(value)[:40]!r}")
    if not scale.contains(result):
        raise RowError(
            f"{name} is off the scale: {format_score(result)} is not within {scale.texts[0]} to {scale.texts[-1]}"
        )
    return result


def _label(record: Mapping[str, Any], scale: ScoreScale) -> float:
    value = _find(record, "score")
    if value is not None:
        return _score(value, "label", scale)
    raters = record.get("scores")
    if not isinstance(raters, list) or not raters:
        raise RowError(f"label is missing: there is none of {_names('score')}")
    each = [_score(rater, "label", scale) for rater in raters if rater is not None]
    if not each:
        raise RowError("label is missing: no rater gave a score")
    return sum(each) / len(each)


def _feedbacks(record: Mapping[str, Any], label: float, scale: ScoreScale) -> tuple[list[str], list[float]]:
    value = _find(record, "feedback")
    given = value if isinstance(value, list) else [] if value is None else [value]
    raters = record.get("scores")
    if isinstance(raters, list) and isinstance(value, list) and len(raters) == len(value):
        labels = [label if rater is None else _score(rater, "a rater's score", scale) for rater in raters]
    else:
        labels = [label] * len(given)
    cut = [cut_score("" if text is None else _checked(text, "feedback"), scale) for text in given]
    kept = [(text, score) for text, score in zip(cut, labels, strict=True) if text]
    return [text for text, _ in kept], [score for _, score in kept]


def cut_score(feedback: str, scale: ScoreScale) -> str:
    """A feedback without the verdict at its end ("[RESULT] 4", "... overall score is **4**/5"), which training adds."""
    return cut_verdict(feedback, (scale.phrase.strip(), "So the overall score is", "[RESULT]"), scale.texts)
