"""What every method of the registry has to keep; a new row is taken up by itself.

The checks are functions of a method's class, so that the last tests can hand them methods that are wrong on purpose.
"""

from __future__ import annotations

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from real_fast.config import Config
from real_fast.methods.base import UpdateCounts
from real_fast.methods.real import Real
from real_fast.methods.registry import METHODS, method_class
from real_fast.methods.sft import SFT, Sft
from real_fast.methods.supervised import LossWeights
from real_fast.train import Trainer, main
from tests.conformance import (
    FURTHER,
    KL,
    assert_gradient_is_the_slope,
    assert_independent_of_micro_batches,
    float64_policy,
)
from tests.golden.trajectories import CASES, FOLDER
from tests.helpers import flags, metric_lines, same_weights


@pytest.fixture
def policy(tiny_llama):
    return float64_policy(tiny_llama)


@pytest.mark.parametrize("changes", [{}, KL | FURTHER], ids=["default", "kl-iterations"])
@pytest.mark.parametrize("name", METHODS)
def test_an_update_does_not_depend_on_its_micro_batches(policy, name, changes):
    assert_independent_of_micro_batches(policy, METHODS[name], changes)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.uses_rollouts])
def test_an_update_on_older_rollouts_does_not_depend_on_its_micro_batches(policy, name):
    assert_independent_of_micro_batches(policy, METHODS[name], KL | FURTHER, ahead=1)


@pytest.mark.parametrize("changes", [{}, KL], ids=["default", "kl"])
@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_is_the_slope_of_the_loss(policy, name, changes):
    assert_gradient_is_the_slope(policy, METHODS[name], changes)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_agrees_with_the_config(name):
    method, config = METHODS[name], Config(method=name)
    assert method.name == name
    method.check(config)
    assert method_class(config) is method
    key, count = method.prompts_per_step(config)
    *sections, last = key.split(".")
    section = config
    for part in sections:
        section = getattr(section, part)
    assert getattr(section, last) == count > 0
    setattr(section, last, count + 5)
    assert method.prompts_per_step(config) == (key, count + 5)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_golden_trajectory(name):
    def trains(case):
        return case[case.index("--method") + 1] if "--method" in case else Config().method

    cases = [case for case, more in CASES.items() if trains(more) == name]
    files = [case for case in cases if (FOLDER / f"{case}.json").is_file()]
    assert files, f"no case of tests/golden/trajectories.py trains {name}: add one, and run make golden"


# Whole runs: one a method, which several tests read, and one more that is stopped and resumed.

RUN = [
    "--warmup.steps", "0", "--train.steps", "4", "--save.every", "1", "--eval.bootstrap", "10", "--eval.on_start",
    "false", "--data.max_train", "24", "--data.max_eval", "4", "--supervised.prompts_per_step", "4",
    "--supervised.feedbacks_per_prompt", "2", "--supervised.stages", "1", "--train.micro_batch_tokens", "1400",
    "--rollout.group_size", "4", "--rollout.max_tokens", "24",
]  # fmt: skip


@pytest.fixture(scope="module", params=METHODS)
def whole(request, golden_model, tmp_path_factory):
    """The name of a method and the folder of its uninterrupted run."""
    output = tmp_path_factory.mktemp(request.param) / "whole"
    assert main([*flags(golden_model, output), *RUN, "--method", request.param]) == 0
    return request.param, output


def assert_resumes_bitwise(whole, output, command, monkeypatch):
    """A run that a signal stopped after its second step, and that goes on, ends as the uninterrupted one."""
    original = Trainer.step

    def interrupted(self):
        if self.state.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert main(command) == 130
    assert sorted((output / "checkpoints").iterdir())[-1].name == "step-000002"
    assert not (output / "summary.json").exists()
    assert main([*command, "--resume"]) == 0
    assert metric_lines(output) == metric_lines(whole)
    assert same_weights(output, whole)


@pytest.mark.e2e
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(whole, golden_model, tmp_path, monkeypatch):
    name, folder = whole
    output = tmp_path / "run"
    assert_resumes_bitwise(folder, output, [*flags(golden_model, output), *RUN, "--method", name], monkeypatch)


@pytest.mark.e2e
def test_every_update_logs_what_all_methods_log(whole):
    name, folder = whole
    method = METHODS[name]
    lines = [line for line in metric_lines(folder) if line["phase"] != "eval"]
    assert [(line["phase"], line["step"]) for line in lines] == [(name, step) for step in (1, 2, 3, 4)]
    for line in lines:
        assert line.keys() >= {"loss", "grad_norm", "learning_rate", "num_tokens", "score/rmse"}
        parts = [value for key, value in line.items() if key.startswith("loss/")]
        assert parts and sum(parts) == pytest.approx(line["loss"], rel=1e-5, abs=1e-6)
        assert line["grad_norm"] >= 0 and line["learning_rate"] > 0 and line["score/rmse"] > 0
        for key in ("reward", "advantage_std"):
            assert (key in line) == method.uses_rollouts
    # An update whose rewards are all one, such as 0, has no gradient.
    assert sum(line["grad_norm"] > 0 for line in lines) >= 2
    tokens = [line["num_tokens"] for line in lines]
    assert tokens == sorted(set(tokens))


@pytest.mark.e2e
def test_every_method_moves_all_weights(whole, golden_model):
    before = load_file(golden_model / "model.safetensors")
    after = load_file(whole[1] / "final" / "model.safetensors")
    assert before.keys() == after.keys()
    still = [key for key, tensor in before.items() if torch.equal(tensor, after[key])]
    assert not still
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


# The checks themselves: methods that are wrong on purpose.


class OwnCounts(Real):
    """Divides by what its micro-batch holds, not by what the update does."""

    def loss(self, counts, old=None, compare=False):
        def loss(hidden, weight, batch):
            valid = batch.rollout_valid
            own = UpdateCounts(int(valid.sum()), int(valid[batch.rollout].sum()))
            return super(OwnCounts, self).loss(own, old, compare)(hidden, weight, batch)

        return loss


def twice(method):
    """The method with twice its gradient, at the same loss."""

    class Twice(method):
        def loss(self, counts, old=None, compare=False):
            inner = super().loss(counts, old, compare)

            def loss(hidden, weight, batch):
                out = inner(hidden, weight, batch)
                out.loss = 2 * out.loss - out.loss.detach()
                return out

            return loss

    return Twice


class Remembers(Sft):
    """Weighs an update by how many this process has made, which no checkpoint holds."""

    made = 0

    @property
    def weights(self):
        return LossWeights(feedback=1.0 + self.made, score=SFT.score)

    def groups(self, *arguments):
        self.made += 1
        return super().groups(*arguments)


def test_counts_of_the_micro_batch_are_noticed(policy):
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_independent_of_micro_batches(policy, OwnCounts, {})


@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_that_is_not_the_slope_is_noticed(policy, name):
    with pytest.raises(AssertionError, match="Scalars are not close"):
        assert_gradient_is_the_slope(policy, twice(METHODS[name]), {})


@pytest.mark.e2e
def test_what_a_checkpoint_does_not_hold_is_noticed(golden_model, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, Sft.name, Remembers)
    first, second = tmp_path / "whole", tmp_path / "run"
    more = [*RUN, "--method", Sft.name, "--train.steps", "3"]
    assert main([*flags(golden_model, first), *more]) == 0
    with pytest.raises(AssertionError):
        assert_resumes_bitwise(first, second, [*flags(golden_model, second), *more], monkeypatch)
    assert (second / "final").is_dir()  # resumed and finished, and yet not the same
    losses = [[line["loss"] for line in metric_lines(run) if line["phase"] == Sft.name] for run in (first, second)]
    assert losses[0][:2] == losses[1][:2] and losses[0][2] != losses[1][2]
