"""The layouts that judge data is published in, and people's own names, brought to the names that rows.py knows.

Prometheus's evaluation files, verl's Parquet as the REAL authors publish theirs, chats, Alpaca's instruction and input.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from real_fast.data.values import is_missing, plain, too_deep
from real_fast.errors import ConfigError, RowError
from real_fast.score.verdict import cut_verdict

# What data.fields may map, and the fields of a record that the mapped one stands in place of.
MAPPABLE: dict[str, tuple[str, ...]] = {
    "instruction": ("orig_instruction", "instruction", "prompt", "input", "question"),
    "response": ("orig_response", "response", "output", "completion", "answer"),
    "reference_answer": ("orig_reference_answer", "reference_answer", "reference"),
    "rubric": ("orig_criteria", "rubric", "criteria", "score_rubric"),
    "score": ("orig_score", "score", "label", "human_score", "scores", "gpt4_score", "reward_model"),
    "scores": ("orig_score", "score", "label", "human_score", "scores", "gpt4_score", "reward_model"),
    "feedback": ("orig_feedback", "feedback", "feedbacks", "gpt4_feedback"),
    "feedbacks": ("orig_feedback", "feedback", "feedbacks", "gpt4_feedback"),
    "messages": ("messages", "conversations"),
    "id": ("id",),
    "prompt_id": ("prompt_id",),
}
_LABELS = ("score", "scores", "label", "human_score", "orig_score")
_CHATS = ("messages", "conversations", "prompt")
# What holds more than text in one layout or another, and in the cell of a CSV can only be written as text.
_LISTS = ("scores", "gpt4_score", "feedback", "feedbacks", "gpt4_feedback")
_RECORDS = ("reward_model", "extra_info", "rubric", "score_rubric")
_LONGEST = 50_000  # characters of a list as Python writes it
_TEXTS, _TURNS = r"\[\s*['\"]", r"\[\s*\{\s*['\"](role|content|from|value)['\"]"
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_SECTIONS = {
    "instruction": "###The instruction to evaluate:",
    "response": "###Response to evaluate:",
    "reference_answer": "###Reference Answer (Score ",
    "rubric": "###Score Rubrics:",
    "feedback": "###Feedback:",
}


def check_fields(fields: Mapping[str, str]) -> None:
    """Raise :class:`ConfigError` where ``data.fields`` maps a name that no row has."""
    for name, path in fields.items():
        if name not in MAPPABLE:
            raise ConfigError(
                f"data.fields has {name!r}: it maps {', '.join(MAPPABLE)} to the names that the records have"
            )
        if not isinstance(path, str) or not path:
            raise ConfigError(f"data.fields.{name} is {path!r}: give the name of a field of the records")


def common(
    record: Mapping[Any, Any], fields: Mapping[str, str], phrase: str, scores: Sequence[str] = ()
) -> dict[Any, Any]:
    """A record under the names that :mod:`real_fast.data.rows` reads; one in no known layout stays as it is.

    A prompt that comes ready made is under ``messages``, a list of {"role", "content"} that ends with the user's.

    Args:
        record: As it was read.
        fields: ``data.fields``: a name of :data:`MAPPABLE` to a record's own, with dots into nested records.
        phrase: The scale's, which stands in front of a verdict's score.
        scores: How the scale's are written; numbers are scores too.

    Raises:
        RowError: A chat that cannot be one, a value that is nested too deep, or feedback that is no list any more.
    """
    out = {**{key: value for key, value in record.items() if key not in fields}, **_mapped(record, fields)}
    for name in fields:
        for other in MAPPABLE[name]:
            if other not in fields:
                out.pop(other, None)
    for name, other in (("instruction", "orig_response"), ("response", "orig_instruction")):
        # Beside Prometheus's field, its own name is the one that counts.
        if name in fields and name in out and _has(out, other):
            out[f"orig_{name}"] = out.pop(name)
    if "rubric" in fields:
        out = {k: v for k, v in out.items() if not (isinstance(k, str) and k.endswith("_description"))}
    _from_text(out)
    if "gpt4_score" in out or "gpt4_feedback" in out:
        _prometheus_eval(out)
    if isinstance(reward := plain(out.get("reward_model")), Mapping) and isinstance(plain(out.get("prompt")), list):
        _verl(out, reward, phrase, scores)
        return out
    chats = {name: plain(out.pop(name)) for name in _CHATS if _is_chat(out.get(name))}
    out.pop("messages", None)
    if chats:
        _chat(out, *next(iter(chats.items())), phrase, scores)
    elif _has_sections(out.get("instruction")) and not _has(out, "orig_response"):
        _split_prompt(out, phrase, scores)
    _alpaca(out)
    return out


def _has(record: Mapping[Any, Any], name: str) -> bool:
    return not is_missing(plain(record.get(name)))


def _mapped(record: Mapping[Any, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """The mapped fields that a record has."""
    return {name: _follow(record, path) for name, path in fields.items() if has_path(record, path)}


def has_path(record: Any, path: str) -> bool:
    """Whether a record has the field, whatever it holds, that a value of ``data.fields`` names."""
    if isinstance(record, Mapping) and path in record:
        return True
    parent, _, name = path.rpartition(".")
    return bool(parent) and isinstance(inner := _follow(record, parent), Mapping) and name in inner


def _follow(record: Any, path: str) -> Any:
    """What is at a path: a field of that name, else with dots into nested records; None where there is nothing."""
    if isinstance(record, Mapping) and path in record:
        return record[path]
    value: Any = record
    for part in path.split("."):
        value = plain(value.get(part)) if isinstance(value, Mapping) else None
    return value


def _from_text(out: dict[Any, Any]) -> None:
    """Lists, records and chats that were written as text: as JSON, or as Python writes them (pandas into a CSV)."""
    for name in (*_LISTS, *_RECORDS, *_CHATS, "completion"):
        text = value.strip() if isinstance(value := out.get(name), str) else ""
        if text[:1] not in ("[", "{"):
            continue
        found = _structure(text)
        if name in _LISTS:
            meant = isinstance(found, list)
        elif name in _RECORDS:
            meant = isinstance(found, Mapping) and ("rubric" not in name or "criteria" in found)
        else:
            meant = isinstance(found, list) and bool(found) and all(map(_is_turn, found))
        if meant:
            out[name] = found
        elif text.endswith("]") and re.match(_TEXTS if name in _LISTS else _TURNS, text):
            raise RowError(f"{name} is a list written as text that cannot be read back: {text[:40]!r}")


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _structure(text: str) -> Any:
    """What a text stands for that JSON or Python wrote; None for any other text."""
    if too_deep(text):
        return None
    try:
        return json.loads(text)
    except ValueError:
        pass
    if len(text) > _LONGEST:  # what it is parsed into takes a hundred times the memory
        return None
    try:
        found = ast.literal_eval(text)
        return found if repr(found) == text else None  # NumPy's ['a' 'b'] would be one text
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # TypeError: {{}} would hash a dictionary
        return None


def _prometheus_eval(out: dict[Any, Any]) -> None:
    """vicuna_eval.json and its like: GPT-4's scores are the label (their mean), as in the papers that use them."""
    scores, feedback = plain(out.pop("gpt4_score", None)), plain(out.pop("gpt4_feedback", None))
    if scores is not None:
        out.pop("human_score", None)  # of FLASK: a second label, which data.fields can choose
        out.setdefault("scores" if isinstance(scores, list) else "score", scores)
    if feedback is not None:
        out.setdefault("feedbacks" if isinstance(feedback, list) else "feedback", feedback)


def _verl(out: dict[Any, Any], reward: Mapping[str, Any], phrase: str, scores: Sequence[str]) -> None:
    """verl's record: the prompt is the judge's as it is, the label the ground truth, the feedback in extra_info."""
    out.pop("messages", None)
    if messages := [_message(turn) for turn in plain(out.pop("prompt"))]:
        _ready_made(out, messages)
    out.pop("orig_score", None)
    out["score"] = reward.get("ground_truth")
    extra = plain(out.get("extra_info"))
    if not isinstance(extra, Mapping):
        return
    texts = (extra.get("answer"), extra.get("gpt4_feedback"))
    given = next((text for text in texts if isinstance(text, str) and text), None)
    if given is not None and (_split_verdict(given, phrase, scores) is not None or given is texts[1]):
        out.pop("orig_feedback", None)
        out["feedback"] = given


def _is_chat(value: Any) -> bool:
    return isinstance(value, list | tuple) or type(value).__name__ == "ndarray"


def _chat(out: dict[Any, Any], name: str, turns: list[Any], phrase: str, scores: Sequence[str]) -> None:
    """A chat that ends with the user is a judge's prompt; one that ends with an assistant holds what there is to grade.

    Where the assistant's last words are feedback with a verdict, they are the judge's own, and the rest is its prompt.
    """
    rest = plain(out.pop("completion")) if _is_chat(out.get("completion")) else []
    messages = [_message(turn) for turn in [*turns, *rest]]
    if not messages:
        return
    last = messages[-1]
    if last["role"] == "assistant":
        del messages[-1]
        if not _has(out, "response") and (found := _split_verdict(last["content"], phrase, scores)) and found[1]:
            out.setdefault("feedback", found[0])
            if not any(_has(out, name) for name in _LABELS):
                out["score"] = found[1]
        else:
            if _has(out, "response") and out["response"] != last["content"]:
                raise RowError(f"two responses: {name} ends with an assistant's message, and there is a response too")
            out["response"] = last["content"]
            out["instruction"] = _told(messages)
            return
    elif _has(out, "response"):  # the conversation so far, and the answer to it
        out["instruction"] = _told(messages)
        return
    if not messages or messages[-1]["role"] != "user":
        raise RowError(f"{name} has no message of the user's at its end: there is nothing to answer")
    _ready_made(out, messages)


def _ready_made(out: dict[Any, Any], messages: list[dict[str, str]]) -> None:
    """A prompt of a judge's; responses to one instruction, which it asks about, belong together."""
    out["messages"] = messages
    if not _has(out, "instruction"):
        asked = next((m["content"] for m in reversed(messages) if m["role"] == "user"), messages[-1]["content"])
        out["instruction"] = _sections(asked)["instruction"] if _has_sections(asked) else asked


def _message(given: Any) -> dict[str, str]:
    """One message: OpenAI's role and content, its text parts joined, or ShareGPT's from and value."""
    if not isinstance(given, Mapping):
        raise RowError(f"a message is not an object: {type(given).__name__}")
    role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise RowError("a message holds more than text: images and tools cannot be judged")
        content = "".join(texts)
    if not isinstance(role, str) or not isinstance(content, str):
        raise RowError(f"a message has no role or no text: {str(given)[:60]}")
    return {"role": _ROLES.get(role, role), "content": content}


def _told(messages: list[dict[str, str]]) -> str:
    """Messages as one text: the user's words alone, or every turn under its role."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in messages)


def _has_sections(value: Any) -> bool:
    return isinstance(value, str) and _SECTIONS["instruction"] in value and _SECTIONS["response"] in value


def verdict_phrases(phrase: str) -> list[str]:
    """What a verdict can begin with: the scale's phrase, the REAL authors' and Prometheus's."""
    return [known for known in (phrase.strip(), "So the overall score is", "[RESULT]") if known]


def _split_verdict(text: str, phrase: str, scores: Sequence[str]) -> tuple[str, str | None] | None:
    """A feedback and the score behind it (None for the phrase alone); None where no verdict stands at its end."""
    phrases = verdict_phrases(phrase)
    kept = cut_verdict(text, phrases, scores)
    verdict = text.strip()[len(kept) :].strip()
    if not verdict:
        return None
    begun = next((len(known) for known in phrases if verdict[: len(known)].lower() == known.lower()), 0)
    longest_first = sorted((text.strip() for text in scores), key=len, reverse=True)
    written = "|".join([r"[-+]?\d+(?:\.\d+)?", *map(re.escape, longest_first)])
    score = re.match(rf" ?(?i:score)?[ :*]*({written})", " ".join(verdict[begun:].split()))
    return kept, score[1] if score else None


def _sections(text: str) -> dict[str, str]:
    """The parts of a whole Prometheus prompt under their headings.

    What is graded may quote a heading: the first two are found from the start, those behind the response from the end.
    """
    at = {"instruction": text.find(_SECTIONS["instruction"])}
    at["response"] = text.find(_SECTIONS["response"], at["instruction"])
    end = text.rfind(_SECTIONS["feedback"], at["response"])
    limit = end = len(text) if end < 0 else end
    for name in ("rubric", "reference_answer"):
        if (found := text.rfind(_SECTIONS[name], at["response"], limit)) >= 0:
            at[name] = limit = found
    order = sorted(at, key=lambda name: at[name])
    stops = [at[name] for name in order[1:]] + [end]
    parts = {}
    for name, stop in zip(order, stops, strict=True):
        start = at[name] + len(_SECTIONS[name])
        if name == "reference_answer":  # "###Reference Answer (Score 5):"
            start = text.find(":", start, stop) + 1 or start
        parts[name] = text[start:stop].strip()
    return parts


def _split_prompt(out: dict[Any, Any], phrase: str, scores: Sequence[str]) -> None:
    """Take a whole Prometheus prompt apart, so that any template can put it together again ("prometheus" as it was)."""
    text, verdict = out.pop("instruction"), plain(out.pop("output", None))
    for name, part in _sections(text).items():
        if not (name == "rubric" and _has(out, "rubric")):  # one that data.fields maps
            out.pop("criteria", None)  # FLASK's name of a rubric, which stands in the prompt
            out[name] = part
    if isinstance(verdict, str) and (found := _split_verdict(verdict, phrase, scores)):
        out.setdefault("feedback", found[0].removeprefix("Feedback:").strip())
        if found[1] and not any(_has(out, name) for name in _LABELS):
            out["score"] = found[1]


def _alpaca(out: dict[Any, Any]) -> None:
    """Alpaca's input belongs to its instruction; question and answer stand in for instruction and response."""
    instruction, context = plain(out.get("instruction")), plain(out.get("input"))
    if isinstance(instruction, str) and isinstance(context, str) and instruction and "orig_instruction" not in out:
        del out["input"]
        if context.strip() and context != instruction:
            out["instruction"] = f"{instruction}\n\n{context}"
    for name, other in (("instruction", "question"), ("response", "answer")):
        if other in out and not any(_has(out, known) for known in MAPPABLE[name] if known != other):
            out[name] = out[other]
