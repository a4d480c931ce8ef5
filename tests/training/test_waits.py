"""How often an update waits for the device: once, however many micro-batches it has."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch import nn

from real_fast.batching.micro_batches import micro_batches
from real_fast.config import OptimConfig, TrainConfig, WarmupConfig
from real_fast.distributed.world import ALONE
from real_fast.methods.base import UpdateCounts
from real_fast.methods.raft import RAFT
from real_fast.methods.sft import SFT
from real_fast.methods.supervised import LossWeights, supervised_group, supervised_loss
from real_fast.runs.checkpoint import TrainState
from real_fast.score.scale import ScoreScale
from real_fast.training.step_metrics import StepMetrics
from real_fast.training.timer import Timer
from real_fast.training.update import Updater
from real_fast.training.warmup import sft_order, warm_up
from real_fast.types import JudgeRow
from tests.waits import Waits

SCALE = ScoreScale((1.0, 2.0, 3.0), tuple("123"), (20, 21, 22), "score: ", (60, 61), 1, end_id=9)
TRACT = LossWeights(feedback=1.0, squared_error=1.0)


class Embedding(nn.Module):
    """A policy whose hidden states are its embedding."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(70, 8), nn.Linear(8, 70, bias=False)

    def begin_step(self):
        pass

    end_step = begin_step

    def forward(self, batch, loss):
        return loss(self.embedding(batch.input_ids).flatten(0, 1), self.head.weight, batch)


def rows(count):
    draw = Random(0)

    def ids(n):
        return [draw.randrange(3, 60) for _ in range(n)]

    return [JudgeRow(str(i), str(i), "", "", "", "", 2.0, ["a"], [2.5], ids(5 + i)) for i in range(count)]


def encode(texts):
    return [[30, 31, 32] for _ in texts]


@pytest.mark.parametrize("weights", [SFT, RAFT, TRACT])
def test_a_micro_batch_of_given_feedback_waits_for_nothing(weights):
    policy = Embedding()
    groups = [supervised_group(row, [0], n, encode, SCALE) for n, row in enumerate(rows(4))]
    counts, batches = UpdateCounts.of(groups), micro_batches(groups, 30, 0, True)
    metrics = StepMetrics(groups, SCALE)
    assert len(batches) > 1
    with Waits() as waits:
        for batch in batches:
            out = policy(batch, supervised_loss(weights, SCALE, counts))
            out.loss.backward()
            metrics.add(batch, out, 0)
    assert not waits.lines
    assert ("end" in metrics.batches[0][1].parts) == (weights is RAFT)
    with Waits() as waits:
        metrics.result()
    assert waits.lines  # it would see them


@pytest.mark.parametrize("budget", [1000, 30])
def test_the_warm_up_waits_once_a_step(budget):
    policy, state, lines = Embedding(), TrainState(), []
    train = TrainConfig(micro_batch_tokens=budget)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    updater = Updater(policy, optimizer, None, OptimConfig(), train, 0, ALONE, Timer(state.seconds), state)
    warmup = WarmupConfig(steps=3, batch_size=4)
    order = sft_order(rows(8), warmup, "rows", 0)
    with Waits() as waits:
        warm_up(updater, order, warmup, encode, SCALE, lines.append, lambda: None)
    assert updater._batches == (1 if budget == 1000 else 3)
    # The norm of the gradient; and the losses, behind it.
    assert {name: n for name, n in waits.lines.items() if "sampler" not in name} == {
        "optim.py: clip_and_step": 3,
        "warmup.py: warm_up": 3,
    }
    assert len(lines) == 3 and all(line["loss"] > 0 and line["score_loss"] > 0 for line in lines)
