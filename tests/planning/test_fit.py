"""What is refused before a run starts, on a GPU whose memory a number stands in for."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import pytest
from transformers import MixtralConfig

from real_fast.config import Config
from real_fast.errors import ConfigError
from real_fast.planning.fit import Sequences, check_fits
from real_fast.planning.need import GIB, RESERVE

# Its sizes come with the package: 25.6 GiB of weights, gradients and moments.
MODEL = "Qwen/Qwen3-1.7B"
SMALL = {"micro_batch_tokens": 8192, "activation_checkpointing": True}
ROWS = Sequences(prompt=300, response=100, per_prompt=4, prompts=8)


def run(engine="transformers", **train):
    config = Config(model=MODEL, output="x")
    config.rollout.engine = engine
    config.train.precision = "bf16"
    for name, value in train.items():
        setattr(config.train, name, value)
    return config


def test_a_run_that_cannot_fit_is_refused_with_the_remedy():
    with pytest.raises(
        ConfigError, match=r"does not fit the GPU, which has 28\.0 GiB free: the update takes"
    ) as refused:
        check_fits(run(), None, ROWS, 28 * GIB, 28 * GIB)
    flags = re.search(r"smallest change that fits: (.*)", str(refused.value))[1]
    tokens = re.fullmatch(r"--optim\.offload moments --train\.micro_batch_tokens (\d+)", flags)[1]
    changed = run(micro_batch_tokens=int(tokens))
    changed.optim.offload = "moments"
    check_fits(changed, None, ROWS, 28 * GIB, 28 * GIB)


def test_what_no_settings_help_is_said():
    with pytest.raises(ConfigError, match="No change of settings helps: real-fast plan names the device"):
        check_fits(run(), None, ROWS, GIB, GIB)


def test_what_lacks_only_the_reserve_is_a_warning(caplog):
    """The reserve is a guess, and a run is not refused for it."""
    config = run()
    least = next(n for n in range(50, 60) if fits(config, n * GIB, caplog))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        check_fits(config, None, ROWS, least * GIB - RESERVE, least * GIB - RESERVE)
    assert "this run may not fit the GPU" in caplog.text and "smallest change" in caplog.text


def fits(config, free, caplog):
    caplog.clear()
    try:
        check_fits(config, None, ROWS, free, free)
    except ConfigError:
        return False
    return not caplog.text


def test_short_rows_need_less_than_the_budget_of_a_micro_batch():
    """24,576 tokens are allowed, and an update of one prompt has 700."""
    config = run()
    one = Sequences(prompt=300, response=100, per_prompt=4, prompts=1)
    room = 40 * GIB
    with pytest.raises(ConfigError):
        check_fits(config, None, Sequences(prompt=2000, response=500, per_prompt=8, prompts=64), room, room)
    check_fits(config, None, one, room, room)


def test_the_share_of_vllm_is_what_the_trainer_leaves():
    """No more than is of use (weights, work, 32 sequences of 400 tokens), or what is left beside the trainer."""
    share = check_fits(run("vllm"), None, ROWS, 140 * GIB, 141 * GIB)
    assert share is not None and 3.2 + 1.5 + 1.4 < share * 141 < 3.2 + 1.5 + 1.4 + 1.5
    many = Sequences(prompt=2000, response=500, per_prompt=8, prompts=64)
    share = check_fits(run("vllm", **SMALL), None, many, 60 * GIB, 60 * GIB)
    assert share is not None and share * 60 == pytest.approx(60 - 2 - 12 * 1.7206 / 1.0737, abs=0.6)


def test_a_model_that_cannot_be_counted_is_let_through(caplog):
    experts = MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128,
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        assert check_fits(replace(run(), model="some/experts"), experts, ROWS, GIB, GIB) is None
    assert "not known beforehand" in caplog.text
