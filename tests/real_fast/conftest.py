"""Fixtures of the trainer's tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def tiny_judge(tmp_path_factory, tiny_llama, smollm2_tokenizer):
    """A random model with SmolLM2's tokenizer: everything but the judging, in milliseconds a step."""
    folder = tmp_path_factory.mktemp("tiny_judge")
    tiny_llama(tied=True, vocab_size=49152, hidden_size=16).save_pretrained(folder)
    smollm2_tokenizer.save_pretrained(folder)
    return folder
