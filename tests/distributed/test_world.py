"""What several processes will have to agree on goes through the world: held here with one that speaks for two."""

from __future__ import annotations

import pytest
import torch

from real_fast.config import OptimConfig, TrainConfig
from real_fast.distributed.world import OneProcess
from real_fast.methods.base import UpdateCounts
from real_fast.model.policy import Policy
from real_fast.runs.checkpoint import TrainState
from real_fast.training.optim import build_optimizer, build_scheduler, clip_and_step
from real_fast.training.timer import Timer
from real_fast.training.update import Updater
from tests.helpers import make_groups


class Two(OneProcess):
    """The other process has as many rollouts, one more micro-batch, and a gradient that is not finite."""

    size = 2

    def sum(self, counts):
        return UpdateCounts(2 * counts.rollouts, 2 * counts.tokens)

    def all(self, flag):
        return False

    def max(self, count):
        return count + 1


def test_counts_are_those_of_all_processes():
    groups = make_groups(missing=True)
    one, two = UpdateCounts.of(groups), UpdateCounts.of(groups, Two())
    assert (two.rollouts, two.tokens) == (2 * one.rollouts, 2 * one.tokens)
    assert UpdateCounts.of([], Two()) == UpdateCounts(1, 1)  # the sum is held above 0, not each process's share


def test_a_gradient_that_is_not_finite_elsewhere_is_skipped_here_too(tiny_llama):
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
    norm, stepped = clip_and_step(model, build_optimizer(model, OptimConfig(lr=1.0)), 1.0, Two())
    assert norm > 0 and not stepped
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())


def test_different_numbers_of_micro_batches_are_refused_on_every_process(tiny_llama):
    policy = Policy(tiny_llama(), attention="sdpa")
    optimizer = build_optimizer(policy, OptimConfig())
    scheduler = build_scheduler(optimizer, OptimConfig(), 1)
    parts = (OptimConfig(), TrainConfig(), 0)
    updater = Updater(policy, optimizer, scheduler, *parts, Two(), Timer({}), TrainState())
    with pytest.raises(RuntimeError, match="numbers of micro-batches"):
        updater.micro_batches(make_groups())
