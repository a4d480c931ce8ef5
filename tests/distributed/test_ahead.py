"""Rollouts sampled ahead on several ranks: their threads talk to each other while the update's collectives go on."""

from __future__ import annotations

import copy
import threading
import time

import pytest
import torch

from real_fast.rollout import make
from real_fast.rollout.spread import MainEngine, SpreadEngine
from real_fast.rollout.transformers_engine import TransformersEngine
from real_fast.train import main
from real_fast.training import setup
from tests.distributed.ranks import run_ranks
from tests.helpers import about_the_same, flags, metric_lines, rollout_texts

AHEAD = ["--rollout.engine", "vllm-server", "--rollout.url", "http://127.0.0.1:9", "--rollout.ahead", "1"]


class Beside(TransformersEngine):
    """Has weights of its own, and takes its time in a thread."""

    beside_training = True

    def generate(self, prompts, params):
        if threading.current_thread().name == "rollouts":
            time.sleep(0.02)
        return super().generate(prompts, params)


def run(argv, on_main=False):
    """`on_main`: one engine, which the main rank talks to, as to a server; otherwise one on each."""

    def engine(config, model, tokenizer, scale, path, world):
        if world.size == 1:
            return Beside(copy.deepcopy(model), tokenizer, scale, dtype=torch.float32)
        if on_main and not world.is_main:
            return MainEngine(None, world, "main", torch.float32)
        found = Beside(make._copy(config, model, path), tokenizer, scale, dtype=torch.float32)
        return MainEngine(found, world, "main", torch.float32) if on_main else SpreadEngine(found, world)

    kept, setup.make_engine = setup.make_engine, engine
    try:
        return main(argv)
    finally:
        setup.make_engine = kept


@pytest.mark.parametrize("on_main", [False, True], ids=["an engine on each", "one of the main rank's"])
def test_a_run_that_samples_ahead_on_ranks_is_that_of_one_process(tiny_judge, tmp_path, on_main):
    more = [*AHEAD, "--rollout.log_every", "1", "--rollout.log_prompts", "9", "--objective.normalize_std", "false"]
    more += ["--objective.num_iterations", "2", "--eval.every", "2", "--save.every", "1"]
    assert run(flags(tiny_judge, tmp_path / "one", *more)) == 0
    argv = flags(tiny_judge, tmp_path / "many", *more)
    assert run_ranks(2, run, argv, on_main, group=False, timeout=120) == [0, 0]
    assert rollout_texts(tmp_path / "many") == rollout_texts(tmp_path / "one")
    lines = metric_lines(tmp_path / "many")
    for found, want in zip(lines, metric_lines(tmp_path / "one"), strict=True):
        about_the_same(found, want)
    assert all("sampling/importance_sampling_ratio/max" in line for line in lines if line["phase"] == "real")
