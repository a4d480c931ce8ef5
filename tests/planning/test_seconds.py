"""Seconds of an update, against the same arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from real_fast.config.commands import PlanConfig
from real_fast.errors import ConfigError
from real_fast.planning.cards import BANDWIDTH, BUS, COMPUTE, PER_LAYER, PER_TOKEN, card_of
from real_fast.planning.flops import UpdateFlops
from real_fast.planning.need import need
from real_fast.planning.seconds import seconds
from real_fast.planning.shape import shape_of

MODEL = "Qwen/Qwen3-1.7B"


def config_of(**rollout):
    config = PlanConfig(model=MODEL, gpu_memory=80.0)
    return replace(config, rollout=replace(config.rollout, **rollout))


def of(config, flops=4e15):
    sizes = shape_of(MODEL).sizes
    return seconds(config, sizes, need(config, sizes, False), UpdateFlops(flops, 0.0), card_of("a100-80gb"), True)


def test_the_update_is_its_operations_at_a_share_of_the_peak():
    assert of(config_of()).update == pytest.approx(4e15 / (COMPUTE * 312e12))


def test_a_decoding_step_reads_the_weights_and_the_caches():
    """64 sequences at a time, of 2048 tokens and on average half of 518 behind them, in four turns."""
    config, sizes = config_of(max_num_seqs=64), shape_of(MODEL).sizes
    read = 2 * sizes.parameters + 64 * (2048 + 259) * 2 * 28 * 2048
    step = read / (BANDWIDTH * 2.039e12) + 64 * PER_TOKEN
    prefill = 2 * sizes.parameters * 2048 * 32 / (COMPUTE * 312e12)
    assert of(config).rollouts == pytest.approx(4 * 518 * step + prefill, rel=0.01)
    transformers = of(config_of(max_num_seqs=64, engine="transformers")).rollouts
    assert transformers - of(config).rollouts == pytest.approx(4 * 518 * (28 * PER_LAYER - 64 * PER_TOKEN), rel=0.01)


def test_what_waits_on_the_host_is_moved():
    config, sizes = config_of(), shape_of(MODEL).sizes
    assert of(config).moving == 0
    moved = of(replace(config, optim=replace(config.optim, offload="moments"))).moving
    assert moved == pytest.approx(2 * 8 * sizes.parameters / BUS)
    assert of(replace(config, optim=replace(config.optim, offload="all"))).moving > 0


def test_a_card_by_its_name_or_its_memory():
    assert card_of("H100").memory == 80 and card_of("", 24.0).memory == 24 and card_of("").name == "h100"
    assert card_of("", 1000.0).name == "b200"
    with pytest.raises(ConfigError, match="did you mean rtx-4090"):
        card_of("rtx4090")
