"""Real vLLM on every rank, or held by two together, beside a policy that is spread over them."""

from __future__ import annotations

import importlib.util
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from real_fast.config import Config, RolloutConfig, TrainConfig
from real_fast.distributed import shard
from real_fast.distributed.ranks import Ranks
from real_fast.rollout import engine as engines
from real_fast.rollout.make import hand_over, make_engine
from real_fast.score.scale import ScoreScale
from real_fast.training.setup import spread_policy
from real_fast.types import SamplingParams
from tests.distributed.ranks import run_ranks
from tests.rollout.plain_agreement import plain_compare, trainer_logprobs_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

PROMPTS = [[3, 14, 15, 92], [65, 35, 89, 79, 32, 38], [7, 8, 9]]


class Alive:
    """Counts the bytes of whole tensors that were made and are still held."""

    def __init__(self):
        self.now = self.most = self.largest = 0

    def whole(self, tensor, dtype=None):
        found = shard.whole(tensor, dtype)
        size = found.untyped_storage().nbytes()
        self.now, self.largest = self.now + size, max(self.largest, size)
        self.most = max(self.most, self.now)
        weakref.finalize(found, self._gone, size)
        return found

    def _gone(self, size):
        self.now -= size


def no_segments_left():
    """vLLM's shared memory on a CPU has one name for all runs, and stays behind where one was killed."""
    for left in Path("/dev/shm").glob("-tp:0-*-cpushm*"):
        left.unlink(missing_ok=True)


def sampled(folder: Path, tensor_parallel: int):
    """On every rank: samples, the gaps before and after a sync, and what a sync held of whole tensors."""
    world = Ranks(torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scale = ScoreScale.from_tokenizer(tokenizer, [1, 2, 3, 4, 5], "Score: ")
    rollout = RolloutConfig(engine="vllm", max_tokens=16, tensor_parallel=tensor_parallel)
    config = Config(model=str(folder), rollout=rollout, train=TrainConfig(precision="fp32", device="cpu"))
    config.prompt.max_tokens = 300
    policy = spread_policy(config, None, world)
    engine = make_engine(config, policy.model, tokenizer, scale, folder, world)
    hand_over(engine, policy.model)

    def gap():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        plain.load_state_dict({name: shard.whole(p) for name, p in policy.model.state_dict().items()})
        groups = engine.generate(PROMPTS, SamplingParams(n=2, max_tokens=16))
        each = [prompt for prompt, group in zip(PROMPTS, groups, strict=True) for _ in group]
        rollouts = [rollout for group in groups for rollout in group]
        found = plain_compare(rollouts, *trainer_logprobs_of(plain, each, rollouts, scale, 1.0), scale)
        return found.logprob_mean, [list(r.sampled_ids) for r in rollouts]

    first, samples = gap()
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "mlp" in name:
                parameter.mul_(1.5)
    withheld, _ = gap()
    alive = Alive()
    engines.whole = alive.whole  # type: ignore[attr-defined]
    engines.publish(engine, policy.model)
    synced, _ = gap()
    engine.close()
    return {
        "samples": samples,
        "gaps": (first, withheld, synced),
        "held": (alive.most, alive.largest),
        "world": torch.distributed.get_world_size(),
    }


@pytest.fixture(scope="module")
def folder(tiny_llama, golden_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tokenizer = AutoTokenizer.from_pretrained(golden_model)
    tiny_llama(False, len(tokenizer), 128, head_dim=32, initializer_range=0.08).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def check(found, ranks):
    for one in found:
        first, withheld, synced = one["gaps"]
        assert first <= 0.05 and synced <= 0.05 and withheld >= 0.1
        most, largest = one["held"]
        assert 0 < most <= 2 * largest
        assert one["samples"] == found[0]["samples"] and one["world"] == ranks


@pytest.fixture(scope="module")
def apart(folder):
    return run_ranks(2, sampled, folder, 1, timeout=200)


def test_an_engine_on_every_rank(apart):
    check(apart, 2)


def test_two_ranks_hold_an_engine_together(folder, apart):
    no_segments_left()
    found = run_ranks(2, sampled, folder, 2, timeout=200)
    check(found, 2)
    assert found[0]["samples"] == apart[0]["samples"]  # of a prompt's place, whoever samples it
