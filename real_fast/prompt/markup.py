"""What a model's chat template writes around messages, found by rendering it with probes; no list of families.

The plain-text part of it (Mistral's ``[/INST]``) is what data must not spell; see :mod:`real_fast.prompt.guard`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from real_fast.errors import PromptError
from real_fast.score.ending import TEMPLATE_ERRORS

THINK, END_THINK = "<think>", "</think>"
# Words that no template writes by itself.
_PROBES = {"system": "probesystemzq", "first": "probefirstzq", "answer": "probeanswerzq", "last": "probelastzq"}
_RESERVED = (
    "conversation",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_tensors",
    "return_dict",
)


@dataclass(frozen=True)
class ChatMarkup:
    """How a model's prompts are marked up.

    Attributes:
        has_template: Whether there is a chat template at all.
        system_role: Whether a system message has a place of its own.
        generation: What must be added behind a prompt so that the assistant's turn begins, where the template leaves
            its generation prompt out; else empty.
        opens_thinking: Whether the generation prompt ends inside a ``<think>`` block.
        marks: Pieces of markup that are plain text in this vocabulary.
    """

    has_template: bool
    system_role: bool = False
    generation: str = ""
    opens_thinking: bool = False
    marks: frozenset[str] = frozenset()


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]], kwargs: Mapping[str, Any], begin: bool = True) -> str:
    """Messages through the tokenizer's chat template.

    Args:
        tokenizer: A Transformers tokenizer with a chat template.
        messages: Each with role and content.
        kwargs: Further arguments of the template.
        begin: Whether the assistant's turn begins behind them. An assistant's own last message goes on instead.
    """
    goes_on = begin and messages[-1]["role"] == "assistant"
    return str(
        tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=begin and not goes_on,
            continue_final_message=goes_on,
            **kwargs,
        )
    )


def find_markup(tokenizer: Any, kwargs: Mapping[str, Any], control: Sequence[str]) -> ChatMarkup:
    """Probe a tokenizer's chat template.

    Args:
        tokenizer: A Transformers tokenizer.
        kwargs: Further arguments of its chat template.
        control: Texts of the control tokens, which are no plain text.

    Raises:
        PromptError: An argument that is not the template's, or a template that cannot hold a user's message.
    """
    if reserved := sorted(set(kwargs) & set(_RESERVED)):
        raise PromptError(f"prompt.chat_template_kwargs has {reserved[0]!r}, which is not for the template to set")
    if not getattr(tokenizer, "chat_template", None):
        return ChatMarkup(has_template=False)

    def tried(*roles: str, begin: bool = True) -> str | None:
        speakers = {"system": "system", "first": "user", "answer": "assistant", "last": "user"}
        messages = [{"role": speakers[role], "content": _PROBES[role]} for role in roles]
        try:
            text = render(tokenizer, messages, kwargs, begin)
        except TEMPLATE_ERRORS:  # such as Mistral's "roles must alternate"
            return None
        return text if all(_PROBES[role] in text for role in roles) else None

    try:
        alone = render(tokenizer, [{"role": "user", "content": _PROBES["last"]}], kwargs)
    except TEMPLATE_ERRORS as error:
        raise PromptError(f"the model's chat template fails: {type(error).__name__}: {error}") from error
    if _PROBES["last"] not in alone:
        raise PromptError("the model's chat template drops the user's message: it cannot hold a judge prompt")
    with_system = tried("system", "last")
    talk = tried("system", "first", "answer", "last") or tried("first", "answer", "last") or alone
    before, *between, behind = re.split("|".join(_PROBES.values()), talk)
    marks = _bracketed(_plain(before, control)[-1])
    for text in (*between, behind):
        for line in _plain(text, control):
            marks |= _bracketed(line) or _label(line)
    generation = _left_out(tried("last"), tried("last", begin=False), tried("first", "answer"))
    opened = (behind + generation).rpartition(THINK)
    return ChatMarkup(
        has_template=True,
        system_role=with_system is not None,
        generation=generation,
        opens_thinking=bool(opened[1]) and END_THINK not in opened[2],
        marks=frozenset(marks),
    )


def _left_out(begun: str | None, ended: str | None, answered: str | None) -> str:
    """The start of the assistant's turn, as in front of an answer, where asking for it changes nothing."""
    if begun is None or begun != ended or answered is None:
        return ""
    after = begun.partition(_PROBES["last"])[2]
    start = answered.partition(_PROBES["first"])[2].partition(_PROBES["answer"])[0]
    missing = start.removeprefix(after) if start.startswith(after) else ""
    return missing if missing.strip() else ""  # Llama 2 and Mistral begin an answer with a space: the model's own


def _plain(text: str, control: Sequence[str]) -> list[str]:
    """The lines of a piece of markup without its control tokens; at least one."""
    for token in sorted(control, key=len, reverse=True):
        text = text.replace(token, "\n")
    return [" ".join(line.split()) for line in text.split("\n") if line.strip()] or [""]


def _bracketed(line: str) -> set[str]:
    """Words such as [INST], <<SYS>> or <|user|>."""
    return {word for word in line.split() if word[0] in "[<{|" and word[-1] in "]>}|" and any(map(str.isalnum, word))}


def _label(line: str) -> set[str]:
    """A line such as "### Response:" or "USER:"; a role's bare name is an ordinary word."""
    return {line} if re.search(r"[^\W\d_]", line) and re.search(r"[^\w\s]", line) else set()
