"""The token that ends an assistant's turn: a trained judge writes it behind its score, and every engine stops there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2.exceptions import TemplateError

# What rendering a template can raise, Transformers' own checks of the messages included.
_OF_VALUES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
TEMPLATE_ERRORS = (TemplateError, *_OF_VALUES, MemoryError, RecursionError)
_ANSWER = "The answer."
# How reasoning models mark what is not their answer yet.
THOUGHTS = {"<think>": "</think>", "[THINK]": "[/THINK]"}


def end_of_turn(tokenizer: Any, chat_template_kwargs: Mapping[str, Any] = {}) -> int | None:
    """The token that the chat template, given its arguments, writes behind an assistant's turn, such as "<|im_end|>".

    Where there is no template, or it writes none of the tokenizer's added tokens there: the tokenizer's EOS, or None
    where it has none.
    """
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **chat_template_kwargs)
        except TEMPLATE_ERRORS:  # one that takes other turns than these
            text = ""
        added = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        behind = tokenizer.encode(text.rpartition(_ANSWER)[2], add_special_tokens=False)
        end = next((int(token) for token in behind if token in added), None)
        if end is not None:
            return end
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


def thought_closings(tokenizer: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What is put behind a thought that was cut off, by the tag that ends it: the tag on a line of its own, as tokens.

    An empty thought is then what Qwen3's chat template writes for one.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    before = encode("text")  # SentencePiece puts a space in front of what a text begins with
    found = {}
    for tag in THOUGHTS.values():
        ids = encode(f"text\n{tag}\n\n")
        found[tag] = ids[len(before) :] if ids[: len(before)] == before else encode(f"\n{tag}\n\n")
    return tuple((tag, tuple(ids)) for tag, ids in found.items())


def stop_at(model: Any, token: int | None) -> None:
    """Let a model's generation configuration, which is saved with it, end a text at `token` too."""
    config = model.generation_config
    known = config.eos_token_id
    stops = [] if known is None else list(known) if isinstance(known, list | tuple) else [known]
    if token is not None and token not in stops:
        config.eos_token_id = [*stops, token] if stops else token
