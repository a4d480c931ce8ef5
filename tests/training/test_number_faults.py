"""Numbers that are none, and gradients that explode: what a step leaves alone, and what a run says of it."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from real_fast.config import OptimConfig
from real_fast.distributed.ranks import Ranks
from real_fast.methods import binary_rl
from real_fast.methods.policy_gradient import PolicyGradient
from real_fast.model.ref_policy import RefPolicy
from real_fast.runs.checkpoint import _read_state
from real_fast.runs.optimizer_state import tensors_of
from real_fast.train import Trainer, main
from real_fast.training import warmup
from real_fast.training.optim import build_optimizer, build_scheduler, clip_and_step
from real_fast.training.spikes import Spikes
from real_fast.training.update import Updater
from real_fast.utils.jsonio import read_jsonl
from tests.distributed.ranks import run_ranks
from tests.golden.trajectories import run_flags
from tests.helpers import metric_lines, same_weights

NAN = float("nan")
FEW = ["--rollout.max_tokens", "8", "--rollout.check_every", "0", "--eval.bootstrap", "10", "--data.max_eval", "4"]
FEW += ["--warmup.steps", "0", "--save.every", "1", "--save.keep", "9", "--optim.lr_warmup_steps", "4"]
# A micro-batch a group: three an update.
SMALL = ["--train.micro_batch_tokens", "400", "--train.steps", "4"]


def layer():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 8))  # 6144 numbers: 8 bits from 4096 on


def give_gradient(model, seed, wrong=None):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()
    if wrong is not None:
        model[0].weight.grad[3, 5] = wrong


@pytest.mark.parametrize("wrong", [NAN, math.inf, -math.inf, 1e30], ids=["nan", "inf", "-inf", "its square overflows"])
@pytest.mark.parametrize(("name", "offload"), [("adamw", "none"), ("adamw", "moments"), ("adamw8bit", "none")])
def test_a_skipped_step_leaves_weights_moments_and_their_count(name, offload, wrong):
    model, other = layer(), layer()
    a, b = (build_optimizer(m, OptimConfig(name=name, offload=offload, lr=1e-3)) for m in (model, other))
    for step in range(4):
        if step == 2:  # one of the two meets it, and is then the same as the other, which never did
            before = {key: tensor.clone() for key, tensor in tensors_of(model, a)}
            give_gradient(model, 9, wrong)
            norm, stepped = clip_and_step(model, a, 1.0)
            assert not stepped and not math.isfinite(norm)
            assert all(torch.equal(tensor, before[key]) for key, tensor in tensors_of(model, a))
            assert all(p.grad is None for p in model.parameters())
        for m, optimizer in ((model, a), (other, b)):
            give_gradient(m, step)
            assert clip_and_step(m, optimizer, 1.0)[1]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(tensors_of(model, a), tensors_of(other, b), strict=True))


def test_a_first_step_that_is_skipped_makes_no_moments():
    model = layer()
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3))
    give_gradient(model, 0, NAN)
    assert not clip_and_step(model, optimizer, 1.0)[1] and not dict(tensors_of(model, optimizer))


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_an_exploding_gradient_is_clipped_and_said(clip, caplog):
    spikes = Spikes(clip)
    for norm in (0.0, 2.0, 1.0, 3.0, 0.0, 2.5, 900.0, 2.0):
        spikes.see(norm)
    assert not caplog.records
    spikes.see(2e6)
    assert "is 2e+06, 8.89e+05 times its median over the last 6 steps" in caplog.text
    assert ("clipped to 1 " if clip else "and it was not clipped") in caplog.text and "lower optim.lr" in caplog.text
    model = layer()
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3))
    give_gradient(model, 0, 1e12)
    norm, stepped = clip_and_step(model, optimizer, clip)
    assert stepped and norm == pytest.approx(1e12)
    moment = dict(tensors_of(model, optimizer))["0.weight:exp_avg"]
    assert (float(moment.abs().max()) < 0.11) == bool(clip)  # a tenth of a gradient of norm 1 goes into it


class Broken:
    """Makes something not a number in the updates behind so many others, on one rank or all."""

    def __init__(self, monkeypatch):
        self.patch, self.step, self.calls = monkeypatch, -1, 0
        step, owner = Trainer.step, self

        def stepped(trainer):
            owner.step, owner.calls = trainer.state.step, 0
            return step(trainer)

        monkeypatch.setattr(Trainer, "step", stepped)

    def one_loss(self, steps, call=1, method=PolicyGradient):
        """The loss of one micro-batch; `call` counts an update's, those of all iterations."""
        original = method.loss

        def loss(its, *args, **kwargs):
            made = original(its, *args, **kwargs)

            def broken(hidden, weight, batch):
                out = made(hidden, weight, batch)
                now, self.calls = self.calls, self.calls + 1
                return replace(out, loss=out.loss * NAN) if self.step in steps and now == call else out

            return broken

        self.patch.setattr(method, "loss", loss)

    def reward(self, steps):
        original = binary_rl.outcome_reward

        def rewards(*args):
            found = original(*args)
            if self.step in steps:
                found[0] = NAN
            return found

        self.patch.setattr(binary_rl, "outcome_reward", rewards)

    def reference(self, steps, value):
        original = RefPolicy.logprobs

        def logprobs(its, batches):
            found = original(its, batches)
            if self.step in steps:
                found[0][0] = value
            return found

        self.patch.setattr(RefPolicy, "logprobs", logprobs)


@pytest.fixture
def broken(monkeypatch):
    return Broken(monkeypatch)


def updates(output, *phases):
    return [line for line in read_jsonl(output / "metrics.jsonl") if line["phase"] in (phases or ("real", "binary_rl"))]


def checkpoint(output, step):
    folder = output / "checkpoints" / f"step-{step:06d}"
    return load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors"), _read_state(folder)


KINDS = {
    "a micro-batch": (lambda b: b.one_loss({1}), []),
    "a reward": (lambda b: b.reward({1}), ["--method", "binary_rl"]),
    "the reference": (lambda b: b.reference({1}, NAN), ["--objective.kl_coef", "0.1"]),
    "an infinite reference": (lambda b: b.reference({1}, math.inf), ["--objective.kl_coef", "0.1"]),
}


@pytest.mark.e2e
@pytest.mark.parametrize("kind", KINDS)
def test_one_number_that_is_none_costs_its_step_and_nothing_else(golden_model, tmp_path, broken, kind):
    """Data go on; weights, moments and their count, and the learning rate's schedule stay where they were."""
    inject, more = KINDS[kind]
    inject(broken)
    assert main(run_flags(golden_model, tmp_path / "run", *FEW, *SMALL, "--train.steps", "3", *more)) == 0
    lines = updates(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1] and lines[1]["grad_norm"] is None
    assert lines[1]["loss"] is None and lines[2]["loss"] is not None
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] == 0 and rates[1] == rates[2] > 0  # a warm-up of 4 steps: one was taken, and then none
    (weights, moments, state), (after, moments_after, state_after) = (checkpoint(tmp_path / "run", n) for n in (1, 2))
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    assert moments_after.keys() == moments.keys()
    assert all(torch.equal(moments_after[k], x) for k, x in moments.items() if not k.startswith("random"))
    assert state.scheduler == state_after.scheduler == {"last_epoch": 1}
    assert (state.rows_seen, state_after.rows_seen) == (3, 6) and state_after.num_tokens > state.num_tokens
    assert (state_after.skipped_steps, state_after.idle_updates) == (1, 1)
    third, _, state_third = checkpoint(tmp_path / "run", 3)
    assert not all(torch.equal(third[name], tensor) for name, tensor in weights.items())
    assert state_third.scheduler == {"last_epoch": 2} and state_third.idle_updates == 0


@pytest.mark.e2e
def test_of_two_iterations_the_first_skipped_the_second_is_taken(golden_model, tmp_path, broken):
    broken.one_loss({1}, call=2)  # the last of three micro-batches in the first iteration
    more = ["--train.steps", "2", "--objective.num_iterations", "2"]
    assert main(run_flags(golden_model, tmp_path / "run", *FEW, *SMALL, *more)) == 0
    lines = updates(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [0, 1]
    assert lines[1]["ratio/mean"] == pytest.approx(1, abs=1e-6)  # the weights had not moved
    _, _, state = checkpoint(tmp_path / "run", 2)
    assert state.scheduler == {"last_epoch": 3} and state.idle_updates == 0
    (before, *_), (after, *_) = checkpoint(tmp_path / "run", 1), checkpoint(tmp_path / "run", 2)
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("steps", "cut", "more"),
    [
        # From a checkpoint without any moments.
        ({0, 1}, 1, ["--optim.schedule", "cosine", "--optim.name", "adamw8bit"]),
        ({1}, 2, ["--objective.num_iterations", "2", "--objective.kl_coef", "0.1"]),
    ],
)
def test_a_run_resumed_behind_skipped_steps_is_the_whole_one_bitwise(golden_model, tmp_path, broken, steps, cut, more):
    broken.one_loss(steps)
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert main(run_flags(golden_model, whole, *FEW, *SMALL, *more)) == 0
    shutil.copytree(whole, again)
    for name in ("final", "eval", "summary.json"):
        path = again / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for step in range(cut + 1, 5):
        shutil.rmtree(again / "checkpoints" / f"step-{step:06d}")
    assert main(run_flags(golden_model, again, *FEW, *SMALL, *more, "--resume")) == 0
    assert metric_lines(again) == metric_lines(whole) and same_weights(again, whole)
    for a, b in zip(checkpoint(again, 4)[1].items(), checkpoint(whole, 4)[1].items(), strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1])


@pytest.mark.e2e
def test_skipped_steps_in_a_row_stop_the_run_with_a_checkpoint_to_go_on_from(golden_model, tmp_path, broken, capsys):
    broken.one_loss({1, 2, 3})
    flags = run_flags(golden_model, tmp_path / "run", *FEW, *SMALL, "--save.every", "0", "--train.give_up_after", "2")
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert "2 updates in a row trained nothing" in error and "lower optim.lr, or set train.precision to fp32" in error
    assert "step-000003 is kept: go on with --resume" in error
    weights, _, state = checkpoint(tmp_path / "run", 3)
    assert state.idle_updates == state.skipped_steps == 2 and all(torch.isfinite(t).all() for t in weights.values())
    broken.step, broken.patch = -1, broken.patch
    broken.one_loss(set())
    assert main([*flags, "--resume", "--train.give_up_after", "9"]) == 0


@pytest.mark.e2e
def test_the_warm_up_skips_in_the_same_way(golden_model, tmp_path, monkeypatch, capsys):
    """Of its three steps the second is skipped: its rate and its moments are those of two steps."""
    calls, original = [], warmup.clip_and_step

    def clip(policy, optimizer, *args):
        if len(calls) == 1:
            next(p for p in policy.parameters() if p.grad is not None).grad.view(-1)[0] = NAN
        calls.append(original(policy, optimizer, *args))
        counts = {int(state["step"]) for state in optimizer.state.values()}
        assert counts == {sum(stepped for _, stepped in calls)}
        return calls[-1]

    monkeypatch.setattr(warmup, "clip_and_step", clip)
    more = ["--warmup.steps", "3", "--train.steps", "0", "--save.every", "0"]
    assert main(run_flags(golden_model, tmp_path / "run", *FEW, *more)) == 0
    lines = updates(tmp_path / "run", "warmup")
    assert [line["skipped"] for line in lines] == [False, True, False]
    assert lines[0]["learning_rate"] > lines[1]["learning_rate"] == lines[2]["learning_rate"]
    assert "an update trained nothing, since the gradient was not finite" in capsys.readouterr().err


def on_one_rank(argv):
    """A run whose second update is not a number on rank 1 alone."""
    from _pytest.monkeypatch import MonkeyPatch

    seen, original = [], Ranks.all
    with MonkeyPatch.context() as patch:
        broken = Broken(patch)
        if torch.distributed.get_rank() == 1 if torch.distributed.is_initialized() else False:
            broken.one_loss({1}, call=0)
        patch.setattr(Ranks, "all", lambda self, flag: seen.append((flag, original(self, flag))) or seen[-1][1])
        return main(argv), seen


@pytest.mark.e2e
@pytest.mark.parametrize("more", [[], ["--train.lora.r", "2"]], ids=["sharded", "lora"])
def test_a_number_that_is_none_on_one_rank_is_skipped_by_all(tiny_judge, tmp_path, more):
    from tests.helpers import flags

    argv = flags(tiny_judge, tmp_path / "run", *more, "--warmup.steps", "0", "--train.steps", "3", "--save.every", "1")
    found = run_ranks(2, on_one_rank, argv, timeout=120)
    assert [status for status, _ in found] == [0, 0]
    lines = updates(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1] and lines[2]["loss"] is not None
    folders = [tmp_path / "run" / "checkpoints" / f"step-{n:06d}" for n in (1, 2, 3)]
    one, two, three = (
        {key: tensor for file in folder.glob("*model*.safetensors") for key, tensor in load_file(file).items()}
        for folder in folders
    )
    assert all(torch.equal(two[key], tensor) for key, tensor in one.items())
    assert any(not torch.equal(three[key], tensor) for key, tensor in one.items())


def test_the_schedule_counts_the_steps_that_were_taken(monkeypatch):
    """The unit behind the runs above: an updater of whose steps every second one is skipped."""
    from types import SimpleNamespace

    from real_fast.config import TrainConfig
    from real_fast.runs.checkpoint import TrainState
    from real_fast.training import update
    from real_fast.training.timer import Timer

    model, state = layer(), TrainState()
    config = OptimConfig(lr=1.0, lr_warmup_steps=4)
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, config, 8)
    updater = Updater(SimpleNamespace(), optimizer, scheduler, config, TrainConfig(), 0, None, Timer({}), state)
    results = iter([True, False, False, True, False, True])
    monkeypatch.setattr(update, "clip_and_step", lambda *_: (optimizer.step(), (1.0, next(results)))[1])
    rates = []
    for _ in range(6):
        rates.append(float(scheduler.get_last_lr()[0]))
        updater.step()
    assert rates == [0.0, 0.25, 0.25, 0.25, 0.5, 0.5] and state.skipped_steps == 3
