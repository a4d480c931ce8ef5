"""The rollout engine beside the trainer: it sleeps while the trainer trains, and has the weights when it samples."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from real_fast.rollout.transformers_engine import TransformersEngine
from real_fast.train import main
from real_fast.training import setup, update
from real_fast.training.groups import FIRST_WAKES, GroupSource
from real_fast.training.timer import Timer
from real_fast.utils.jsonio import read_jsonl
from tests.golden.trajectories import run_flags


class Sleeper(TransformersEngine):
    """An engine with weights of its own, which a wake brings back as they were when it fell asleep."""

    held_bytes = 2**30
    swapped = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model, self.kept, self.calls = copy.deepcopy(self.model), None, []

    def generate(self, *args):
        self.calls.append("generate")
        return super().generate(*args)

    def sleep(self):
        self.calls.append("sleep")
        self.kept = copy.deepcopy(self.model.state_dict())
        return True

    def wake(self):
        if self.kept:
            self.calls.append("wake")
            self.model.load_state_dict(self.kept)
        self.kept = None

    def sync(self, named_tensors):
        if not self.swapped:
            self.wake()
        self.calls.append("sync")
        super().sync(named_tensors)
        self.wake()


def run(golden_model, output, monkeypatch, engine, *flags):
    """A run whose engine is `engine`; returns the exit status and what was done in turn."""
    made, step = [], update.Updater.step

    def make(config, model, tokenizer, scale, _path, _world):
        made.append(engine(model, tokenizer, scale, dtype=torch.float32))
        return made[0]

    def recorded(self):
        made[0].calls.append("step")
        return step(self)

    monkeypatch.setattr(setup, "make_engine", make)
    monkeypatch.setattr(update.Updater, "step", recorded)
    return main(run_flags(golden_model, output, *flags)), made[0].calls


@pytest.mark.e2e
def test_the_engine_sleeps_in_every_update_and_is_synced_behind_every_wake(golden_model, tmp_path, monkeypatch):
    flags = ("--eval.on_start", "true", "--train.steps", "3", "--eval.every", "2")
    status, calls = run(golden_model, tmp_path, monkeypatch, Sleeper, *flags)
    assert status == 0
    sampled = ["wake", "sync", "generate", "sleep"]
    evaluated, updated = sampled, [*sampled, "step"]
    before_and_after_the_warmup = evaluated * 2
    for_another_stage = ["wake", "sync"]
    trained = [*updated * 2, *evaluated, *updated, *evaluated]
    assert calls == ["sync", "sleep", *before_and_after_the_warmup, *trained, *for_another_stage]
    lines = [line for line in read_jsonl(tmp_path / "metrics.jsonl") if line["phase"] == "real"]
    assert all(line["memory/engine_gib"] == 1 and line["memory/engine_update_gib"] == 0 for line in lines)


@pytest.mark.e2e
def test_a_wake_that_brings_old_weights_back_ends_the_run_at_once(golden_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Sleeper, "swapped", True)
    status, calls = run(
        golden_model, tmp_path, monkeypatch, Sleeper, "--optim.lr_warmup_steps", "0", "--rollout.check_every", "20"
    )
    assert status == 2 and "the rollout engine and the trainer disagree" in capsys.readouterr().err
    assert "generate" in calls and "step" not in calls  # no update from rollouts of weights before the warm-up


def test_the_first_wakes_are_followed_by_a_comparison():
    engine = SimpleNamespace(sleep=lambda: True, sync=lambda _: None)
    policy = SimpleNamespace(model=torch.nn.Linear(1, 1))
    groups = GroupSource(SimpleNamespace(uses_rollouts=True), None, engine, Timer({}), None, 20)
    compared = []
    for step in range(1, 10):
        with groups.awake(policy):
            compared.append(groups.compares(step))
    assert compared[0] is False  # it had never slept
    groups.check_every = 0
    assert not groups.compares(20)
    assert compared == [False, *[True] * FIRST_WAKES, *[False] * (8 - FIRST_WAKES)]


def test_an_engine_that_cannot_sleep_is_synced_when_weights_have_changed():
    synced = []
    engine = SimpleNamespace(sleep=lambda: False, sync=lambda tensors: synced.append([name for name, _ in tensors]))
    policy = SimpleNamespace(model=torch.nn.Linear(1, 1))
    memory = SimpleNamespace(mark=lambda _: None)
    groups = GroupSource(SimpleNamespace(uses_rollouts=True), None, engine, Timer({}), memory, 20)
    for changed in (False, True, False):
        if changed:
            groups.publish()
        with groups.awake(policy):
            pass
    assert synced == [["weight", "bias"]] and groups.wakes == 0
    assert groups.compares(20) and not groups.compares(1)
