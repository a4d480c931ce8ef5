"""From a raw record to a judge row: the field names that datasets use, and what makes a record unusable."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from real_fast.data.layouts import common, verdict_phrases
from real_fast.data.values import as_mapping, is_missing, number, plain
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
_FIELDS_SHOWN = 12
_RUBRIC_KEY = re.compile(r"(?:score)?[ _]?(\d+(?:\.\d+)?)(?:[ _]?description)?")


def instruction_key(instruction: str) -> str:
    """A stable 16-digit key of an instruction that ignores how its white space is laid out."""
    return hashlib.sha256(" ".join(instruction.split()).encode()).hexdigest()[:16]


def row_key(row: JudgeRow) -> str:
    """16 digits that a row's texts alone make up, however white space is laid out.

    The same row has the same key whatever file, format or id it comes with; labels and feedback have no part in it.
    """
    texts = [row.instruction, row.response, row.rubric, row.reference_answer]
    texts += [text for message in row.messages for text in (message["role"], message["content"])]
    content = json.dumps([" ".join(text.split()) for text in texts])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def parse_row(
    record: Any,
    row_id: str,
    scale: ScoreScale,
    needs_rubric: bool,
    fields: Mapping[str, str] | None = None,
    needs_extra: bool = False,
) -> JudgeRow:
    """Read a record.

    Args:
        record: A mapping with the fields of :data:`PROMETHEUS` or :data:`ALIASES`, and optionally id, prompt_id and
            scores (each rater's, in the order of feedbacks; their mean is the label where there is no other); or one
            in a layout of :mod:`real_fast.data.layouts`. None, NaN and what else stands for a missing value are as
            good as no field.
        row_id: Id of a record that has none.
        scale: Labels must lie on it; its phrase and a score at the end of a feedback are cut off.
        needs_rubric: Whether a record without a rubric is unusable.
        fields: ``data.fields``: names of ours that are other names in the record.
        needs_extra: Whether all of the record's fields are kept, for a template that uses them.

    Raises:
        RowError: What is missing, not text, not a number or off the scale.
    """
    known = common(as_mapping(record), fields or {}, scale.phrase, scale.texts)
    texts = _texts(known, needs_rubric)
    if needs_extra:
        texts.extra = _extra(record)
    label = _label(known, scale)
    feedbacks, feedback_labels = _feedbacks(known, label, scale)
    given_id, prompt_id = (_id(known, name) for name in ("id", "prompt_id"))
    return JudgeRow(
        id=given_id or row_id,
        prompt_id=prompt_id or instruction_key(texts.instruction),
        **vars(texts),
        label=label,
        feedbacks=feedbacks,
        feedback_labels=feedback_labels,
    )


def parse_texts(record: Any, needs_rubric: bool, phrase: str = "", needs_extra: bool = False) -> JudgeTexts:
    """Read the texts of a record, which needs no label. Arguments and errors as of :func:`parse_row`.

    `phrase` is the scale's: in a chat that ends with the judge's own answer, it tells that from a response.
    """
    texts = _texts(common(as_mapping(record), {}, phrase), needs_rubric)
    if needs_extra:
        texts.extra = _extra(record)
    return texts


def _extra(record: Any) -> dict[str, Any]:
    """A record's own fields, for templates, and those that stand apart under ``extra``; a missing value is None."""
    own = {str(key): plain(value) for key, value in as_mapping(record).items()}
    return {**own, **own["extra"]} if isinstance(own.get("extra"), dict) else own


def _texts(record: Mapping[Any, Any], needs_rubric: bool) -> JudgeTexts:
    instruction = _text(record, "instruction", required=True)
    if messages := record.get("messages"):  # a prompt that comes ready made has all of it
        for message in messages:
            _checked(message["content"], "a message")
        return JudgeTexts(instruction, "", "", "", messages)
    response = _text(record, "response", required=True)
    rubric = _rubric(record)
    if needs_rubric and not rubric:
        raise RowError(f"{_lacks('rubric', record)}; the template uses it")
    return JudgeTexts(instruction, response, rubric, _text(record, "reference_answer", required=False))


def _lacks(name: str, record: Mapping[Any, Any]) -> str:
    """Why there is no `name`: a field that says nothing, or what was looked for and what there is instead."""
    what, names = "label" if name == "score" else name, (PROMETHEUS[name], *ALIASES[name])
    if empty := [key for key in names if key in record and _says_nothing(record[key])]:
        return f"{what} is empty: the field {empty[0]}"
    there = ", ".join(str(key)[:40] for key in list(record)[:_FIELDS_SHOWN])
    more = ", ..." if len(record) > _FIELDS_SHOWN else ""
    return f"{what} is missing: there is none of {', '.join(names)} among its fields: {there or 'none'}{more}"


def _says_nothing(value: Any) -> bool:
    """Whether a field that was looked at holds no text: a missing value, white space, or a rubric without a word."""
    value = plain(value)
    return is_missing(value) or isinstance(value, Mapping) or (isinstance(value, str) and not value.strip())


def _get(record: Mapping[Any, Any], key: str) -> Any:
    """A field's plain value, None where it is missing or says nothing."""
    value = plain(record.get(key))
    return None if is_missing(value) else value


def _find(record: Mapping[Any, Any], name: str) -> Any:
    """The value of a field under whichever name it has, None where there is none."""
    if (orig := _get(record, PROMETHEUS[name])) is not None:
        return orig
    if name in ("instruction", "response") and any(
        _get(record, PROMETHEUS[n]) is not None for n in ("instruction", "response")
    ):
        return None
    given = {alias: _get(record, alias) for alias in ALIASES[name]}
    found = {alias: value for alias, value in given.items() if value is not None}
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


def _id(record: Mapping[Any, Any], key: str) -> str:
    """An id as text, empty where there is none; 7.0 is what a data frame makes of 7 where another row has none."""
    value = _get(record, key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else _checked(str(value), key)


def _text(record: Mapping[Any, Any], name: str, required: bool) -> str:
    value = _find(record, name)
    text = "" if value is None else _checked(value, name)
    if required and not text.strip():
        raise RowError(_lacks(name, record))
    return text


def _rubric(record: Mapping[Any, Any]) -> str:
    value = _find(record, "rubric")
    if isinstance(value, Mapping):
        return _rubric_lines(value.get("criteria"), {k: v for k, v in value.items() if k != "criteria"})
    prefix = "orig_" if _get(record, "orig_criteria") is not None else ""
    described = rf"{prefix}score[\d.]+_description"
    named = {k[len(prefix) :]: plain(v) for k, v in record.items() if re.fullmatch(described, str(k))}
    scores = {k: v for k, v in named.items() if not is_missing(v)}
    text = "" if value is None else _checked(value, "rubric")
    return _rubric_lines(text, scores) if scores else text.strip()


def _rubric_lines(criteria: Any, scores: Mapping[str, Any]) -> str:
    """A rubric given in parts: "[criteria]" and a line per score, lowest score first."""
    described: dict[float, str] = {}
    for key, text in scores.items():
        if is_missing(text):
            continue
        match = _RUBRIC_KEY.fullmatch(str(key).lower())
        if match is None:
            raise RowError(f"rubric has an unknown key: {str(key)[:40]!r} is not criteria or score1_description")
        described[float(match[1])] = _checked(text, f"rubric's {key}").strip()
    lines = [f"Score {format_score(score)}: {text}" for score, text in sorted(described.items())]
    if criteria:
        lines.insert(0, f"[{_checked(criteria, 'rubric').strip()}]")
    return "\n".join(lines)


def _score(value: Any, name: str, scale: ScoreScale) -> float:
    result = number(value)
    if result is None and isinstance(value, str):  # a label that stands for a score: "Good", or "C"
        result = dict(zip((text.strip() for text in scale.texts), scale.values, strict=True)).get(value.strip())
    if result is None:
        hint = " (data.fields.scores takes a list, each rater's)" if isinstance(value, list) else ""
        raise RowError(f"{name} is not a number: {str(value)[:40]!r}{hint}")
    if not scale.contains(result):
        raise RowError(
            f"{name} is off the scale: {format_score(result)} is not within {scale.names[0]} to {scale.names[-1]}"
        )
    return result


def _label(record: Mapping[Any, Any], scale: ScoreScale) -> float:
    value = _find(record, "score")
    if value is not None:
        return _score(value, "label", scale)
    raters = _get(record, "scores")
    if not isinstance(raters, list) or not raters:
        raise RowError(_lacks("score", record))
    each = [_score(rater, "label", scale) for rater in raters if rater is not None]
    if not each:
        raise RowError("label is missing: no rater gave a score")
    return sum(each) / len(each)


def _feedbacks(record: Mapping[Any, Any], label: float, scale: ScoreScale) -> tuple[list[str], list[float]]:
    value = _find(record, "feedback")
    given = value if isinstance(value, list) else [] if value is None else [value]
    raters = _get(record, "scores")
    if isinstance(raters, list) and isinstance(value, list) and len(raters) == len(value):
        labels = [label if rater is None else _score(rater, "a rater's score", scale) for rater in raters]
    else:
        labels = [label] * len(given)
    cut = [cut_score("" if text is None else _checked(text, "feedback"), scale) for text in given]
    kept = [(text, score) for text, score in zip(cut, labels, strict=True) if text]
    return [text for text, _ in kept], [score for _, score in kept]


def cut_score(feedback: str, scale: ScoreScale) -> str:
    """A feedback without the verdict at its end ("[RESULT] 4", "... overall score is **4**/5"), which training adds."""
    return cut_verdict(feedback, verdict_phrases(scale.phrase), scale.texts)
