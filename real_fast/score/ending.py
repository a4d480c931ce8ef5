"""The token that ends an assistant's turn: a trained judge writes it behind its score, and every engine stops there."""

from __future__ import annotations

from typing import Any

from jinja2.exceptions import TemplateError

# What rendering a chat template can raise, Transformers' own checks of the messages included.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
_ANSWER = "The answer."


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that the chat template writes behind an assistant's turn, "<|im_end|>" for example.

    Where there is no template, or it writes none of the tokenizer's added tokens there: the tokenizer's EOS, or None
    where it has none.
    """
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except TEMPLATE_ERRORS:  # one that takes other turns than these
            text = ""
        added = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        behind = tokenizer.encode(text.rpartition(_ANSWER)[2], add_special_tokens=False)
        end = next((int(token) for token in behind if token in added), None)
        if end is not None:
            return end
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


def stop_at(model: Any, token: int | None) -> None:
    """Let a model's generation configuration, which is saved with it, end a text at `token` too."""
    config = model.generation_config
    known = config.eos_token_id
    stops = [] if known is None else list(known) if isinstance(known, list | tuple) else [known]
    if token is not None and token not in stops:
        config.eos_token_id = [*stops, token] if stops else token
