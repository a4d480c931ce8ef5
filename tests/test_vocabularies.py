"""The vocabularies that other tests rely on are the published ones."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("family", "digits", "size"),
    [
        ("qwen3", [16, 17, 18, 19, 20], 151_669),
        ("llama3", [16, 17, 18, 19, 20], None),
        ("deepseek", None, None),
        ("mistral", [28740, 28750, 28770, 28781, 28782], 32_000),
    ],
)
def test_digits_have_their_published_ids(vocabulary, family, digits, size):
    tokenizer = vocabulary(family)
    ids = tokenizer.convert_tokens_to_ids(["1", "2", "3", "4", "5"])
    assert digits is None or ids == digits
    assert None not in ids and tokenizer.unk_token_id not in ids
    assert size is None or len(tokenizer) == size
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    assert "a" in text
    if family in ("qwen3", "llama3", "deepseek"):  # a colon and the line break behind it are one token
        assert len(tokenizer.encode("x:\n", add_special_tokens=False)) == 2
