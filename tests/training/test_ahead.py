"""Rollouts sampled while the update before theirs trains: of which weights, and kept with a checkpoint."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import threading
import time
from array import array

import pytest
import torch

from real_fast.errors import CheckpointError
from real_fast.rollout.transformers_engine import TransformersEngine
from real_fast.train import Trainer, main
from real_fast.training import setup, update
from real_fast.training.ahead import FILE, Ahead
from real_fast.utils.jsonio import read_jsonl
from tests.golden.trajectories import run_flags
from tests.helpers import make_groups, metric_lines, same_weights

AHEAD = ["--rollout.engine", "vllm-server", "--rollout.url", "http://127.0.0.1:9", "--rollout.ahead", "1"]
AHEAD += ["--optim.lr_warmup_steps", "0"]
AHEAD += ["--save.every", "1", "--save.keep", "9", "--rollout.max_tokens", "12", "--eval.bootstrap", "10"]
AHEAD += ["--warmup.steps", "0"]


def version(model):
    """A number that the weights are known by."""
    return float(model.get_output_embeddings().weight.detach().double().abs().sum())


class Beside(TransformersEngine):
    """Samples from a copy of the weights; in the thread of its own, not before the update beside it has been made."""

    beside_training = True
    updated = threading.Event()
    fails_at = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model, self.calls, self.sampling = copy.deepcopy(self.model), [], False

    def generate(self, prompts, params):
        inside = threading.current_thread().name == "rollouts"
        assert not self.sampling
        self.sampling, started = True, version(self.model)
        if inside:
            assert self.updated.wait(60)
            time.sleep(0.1)  # and is at it while the trainer goes on
            if self.fails_at is not None and len(self.calls) >= self.fails_at:
                self.sampling = False
                raise ConnectionResetError("the server is gone")
        found = super().generate(prompts, params)
        assert version(self.model) == started
        self.sampling = False
        self.calls.append(("ahead" if inside else "at once", started))
        return found

    def sync(self, named_tensors):
        assert not self.sampling  # its weights stay as they are while it samples from them
        self.updated.clear()
        super().sync(named_tensors)
        self.calls.append(("sync", version(self.model)))

    def sleep(self):
        raise AssertionError("it samples while the trainer trains")


@pytest.fixture
def run(golden_model, monkeypatch):
    """Runs whose engine is :class:`Beside`; gives their status and what was done in turn, with the weights' version."""
    made, step = [], update.Updater.step

    def make(config, model, tokenizer, scale, *_):
        made.append(Beside(model, tokenizer, scale, dtype=torch.float32))
        return made[-1]

    def stepped(self):
        step(self)
        made[-1].calls.append(("update", version(self.policy.model)))
        Beside.updated.set()

    monkeypatch.setattr(setup, "make_engine", make)
    monkeypatch.setattr(update.Updater, "step", stepped)

    def run(output, *more):
        status = main(run_flags(golden_model, output, *AHEAD, *more))
        return status, made[-1].calls

    return run


def trained(calls):
    """Without what comes before the first rollouts and behind the last update."""
    first = next(i for i, (what, _) in enumerate(calls) if what in ("at once", "ahead"))
    last = max(i for i, (what, _) in enumerate(calls) if what == "update")
    return calls[first : last + 1]


@pytest.mark.e2e
def test_every_update_trains_on_rollouts_of_the_weights_before_the_last_update(run, tmp_path):
    status, calls = run(tmp_path / "run", "--train.steps", "4", "--rollout.check_every", "0")
    assert status == 0
    calls = trained(calls)
    assert [what for what, _ in calls] == [
        "at once", "update", "ahead", "sync", "update", "ahead", "sync", "update", "ahead", "update",
    ]  # fmt: skip
    start = calls[0][1]
    after = [weights for what, weights in calls if what == "update"]
    assert len({start, *after}) == 5
    # The second update's are those of the start, the third's those behind the first update, and so on.
    assert [weights for what, weights in calls if what == "ahead"] == [start, after[0], after[1]]
    assert [weights for what, weights in calls if what == "sync"] == after[:2]
    lines = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if line["phase"] == "real"]
    ratio = [line["sampling/importance_sampling_ratio/mean"] for line in lines]
    assert ratio[0] == pytest.approx(1, abs=1e-3) and all(abs(x - 1) > 1e-3 for x in ratio[1:])
    assert all(line["sampling/importance_sampling_ratio/max"] <= 2 for line in lines)
    assert all(line["time/rollout"] > 0 and line["time/wait"] >= 0 for line in lines)


@pytest.mark.e2e
def test_where_engine_and_trainer_are_compared_nothing_is_sampled_ahead(run, tmp_path):
    status, calls = run(tmp_path / "run", "--train.steps", "4", "--rollout.check_every", "2")
    assert status == 0  # and so the two agreed, in the third update too
    calls = trained(calls)
    assert [what for what, _ in calls] == [
        "at once", "update", "ahead", "update", "sync", "at once", "update", "ahead", "update",
    ]  # fmt: skip
    after = [weights for what, weights in calls if what == "update"]
    assert calls[5][1] == after[1] == calls[7][1]


@pytest.mark.e2e
def test_an_evaluation_waits_for_what_is_being_sampled(run, tmp_path):
    more = ["--train.steps", "3", "--rollout.check_every", "0", "--eval.every", "1", "--save.every", "0"]
    status, calls = run(tmp_path / "run", *more)
    assert status == 0  # or a sync came while the engine was sampling
    assert [what for what, _ in trained(calls)] == [
        "at once", "update", "ahead", "sync", "at once", "update", "ahead", "sync", "at once", "update",
    ]  # fmt: skip


@pytest.mark.e2e
def test_a_stopped_run_keeps_what_was_sampled_and_goes_on_bitwise(run, tmp_path, monkeypatch):
    more = ["--train.steps", "4", "--eval.every", "1", "--rollout.check_every", "0"]
    assert run(tmp_path / "whole", *more)[0] == 0
    original = Trainer.step

    def interrupted(self):
        if self.state.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert run(output, *more)[0] == 130
    kept = json.loads((output / "checkpoints" / "step-000002" / FILE).read_text(encoding="utf-8"))
    assert kept["step"] == 2 and len(kept["groups"]) == 3
    assert not (output / "checkpoints" / "step-000000" / FILE).exists()
    assert run(output, *more, "--resume")[0] == 0
    assert metric_lines(output) == metric_lines(tmp_path / "whole")
    assert same_weights(output, tmp_path / "whole")
    assert not (output / "checkpoints" / "step-000004" / FILE).exists()


@pytest.mark.e2e
def test_an_error_of_the_engine_ends_the_run_and_loses_no_update(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Beside, "fails_at", 4)
    output, more = tmp_path / "run", ["--train.steps", "4", "--rollout.check_every", "0"]
    status, calls = run(output, *more)
    assert status == 2 and "the server is gone" in capsys.readouterr().err
    updates = sum(what == "update" for what, _ in calls)
    newest = sorted((output / "checkpoints").iterdir())[-1]
    assert newest.name == f"step-{updates:06d}" and not (newest / FILE).exists()
    monkeypatch.setattr(Beside, "fails_at", None)
    status, calls = run(output, *more, "--resume")
    assert status == 0 and trained(calls)[0][0] == "at once"  # nothing was kept


def test_errors_keep_their_type_and_come_once():
    ahead = Ahead()
    ahead.launch(3, lambda: [][1])
    assert ahead.files() == {}  # a checkpoint can still be written
    with pytest.raises(IndexError):
        ahead.join()
    assert ahead.take(3) is None
    ahead.launch(3, lambda: [][1])
    ahead.close()


def test_a_batch_is_the_same_behind_its_file(tmp_path):
    groups = make_groups(missing=True)
    for rollout in (r for group in groups for r in group.rollouts):  # as engines give them
        rollout.sampled_ids, rollout.context_ids = array("q", rollout.sampled_ids), array("q", rollout.context_ids)
        rollout.sampled_logprobs = array("d", rollout.sampled_logprobs)
    first = groups[0].rollouts[0]
    first.sampled_logprobs[0], first.score_logprobs[1] = -math.pi, -math.inf
    first.text, first.outcome = "half a pair: \ud83d", 2
    ahead, again = Ahead(), Ahead()
    assert ahead.files() == {} and ahead.take(0) is None
    ahead.launch(7, lambda: groups)
    text = ahead.files()[FILE]
    (tmp_path / FILE).write_text(text, encoding="utf-8")
    again.restore(tmp_path)
    found = again.take(7)
    assert found.groups == groups == ahead.take(7).groups and ahead.take(7) is None
    again.restore(tmp_path)
    assert again.take(6) is None  # of another update
    (tmp_path / FILE).write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(CheckpointError, match="sampled anew"):
        again.restore(tmp_path)
    Ahead().restore(tmp_path / "none")


def test_an_end_at_once_does_not_wait():
    released, ahead = threading.Event(), Ahead()
    ahead.launch(0, lambda: [released.wait(60)])
    ahead.close(at_once=True)
    assert not released.is_set()
    released.set()
    ahead.close()


@pytest.mark.parametrize("engine", ["auto", "transformers", "vllm"])
def test_an_engine_in_the_trainers_process_is_refused(engine, golden_model, tmp_path, capsys):
    assert main(run_flags(golden_model, tmp_path / "run", "--rollout.ahead", "1", "--rollout.engine", engine)) == 2
    assert f"rollout.engine {engine} samples in the trainer's process" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
