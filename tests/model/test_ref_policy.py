"""The frozen copy that the KL is measured from: what it computes, where it comes from on resume, what is logged."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from real_fast.batching.micro_batches import micro_batches
from real_fast.errors import CheckpointError
from real_fast.methods.policy_gradient import PolicyGradient
from real_fast.model.policy import Policy
from real_fast.model.ref_policy import RefPolicy
from real_fast.train import Trainer, main
from real_kernels import HeadOptions, linear_logprob
from tests.helpers import flags, make_groups, metric_lines, same_weights

BOTH = ["--objective.kl_coef", "0.5", "--objective.num_iterations", "2", "--optim.schedule", "cosine"]


def batches():
    return micro_batches(make_groups(), 10**6, 0, True)


def steps(output, method="real"):
    return [m for m in metric_lines(output) if m["phase"] == method]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_the_copy_computes_what_the_policy_computes(tiny_llama, tied, half):
    """To the last bit, in 16 bits too, with weights that 16 bits cannot hold."""
    policy = Policy(tiny_llama(tied=tied), half, "sdpa").train()
    reference = RefPolicy(policy, 0.7, resident=True)

    def of_targets(hidden, weight, batch):
        return linear_logprob(hidden[batch.rows], weight, batch.targets, head=HeadOptions(temperature=0.7))

    want = policy(batches()[0], of_targets)
    (found,) = reference.logprobs(batches())
    assert torch.equal(found, want) and not found.requires_grad
    own = dict(reference.policy.model.named_parameters())
    assert own.keys() == dict(policy.model.named_parameters()).keys()  # a tied head is still tied
    kept = {name for name, p in own.items() if p.dtype == torch.float32}
    if half is None:
        assert kept == own.keys()
    else:
        assert "model.layers.0.mlp.up_proj.weight" not in kept and "model.embed_tokens.weight" in kept
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.1
    assert torch.equal(reference.logprobs(batches())[0], want)
    assert not any(p.requires_grad for p in own.values()) and all(p.requires_grad for p in policy.parameters())


def test_saved_and_loaded_again(tiny_llama, tmp_path):
    policy = Policy(tiny_llama(tied=True), torch.bfloat16, "sdpa")
    reference = RefPolicy(policy, 1.0, resident=False)
    reference.save(tmp_path)
    (want,) = reference.logprobs(batches())
    other = RefPolicy(Policy(tiny_llama(tied=True, seed=5), torch.bfloat16, "sdpa"), 1.0, resident=False)
    assert not torch.equal(other.logprobs(batches())[0], want)
    other.load(tmp_path)
    assert torch.equal(other.logprobs(batches())[0], want)
    with pytest.raises(CheckpointError, match="another model"):
        RefPolicy(Policy(tiny_llama(hidden_size=64)), 1.0, resident=False).load(tmp_path)
    with pytest.raises(CheckpointError, match=r"objective\.kl_every 0"):
        reference.load(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def whole(tiny_judge, tmp_path_factory):
    output = tmp_path_factory.mktemp("kl") / "whole"
    assert main(flags(tiny_judge, output, *BOTH, "--rollout.check_every", "1")) == 0
    return output


def test_a_run_with_kl_and_two_iterations(whole, tiny_judge):
    lines = steps(whole)
    assert [m["step"] for m in lines] == [1, 2, 3, 4, 5]
    # The reference is the policy after the warm-up: nothing is between them at first, whatever the start weights were.
    assert lines[0]["kl"] == 0 and lines[0]["loss/kl"] == 0
    assert all(m["kl"] > 1e-6 for m in lines[1:])
    start, held = (load_file(folder / "model.safetensors") for folder in (tiny_judge, whole / "reference"))
    assert not torch.equal(start["model.norm.weight"], held["model.norm.weight"])
    for m in lines:
        assert 0 <= m["clip_ratio/region_mean"] <= 1 and 0.5 < m["ratio/mean"] < 2 and m["ratio/mean"] != 1
        assert m["sampling/sampling_logp_difference/mean"] < 1e-4  # of the first iteration, before the weights move
    # The schedule counts optimiser steps: 10, of which the first iteration of step t is the 2(t - 1)th.
    cosine = [0.5 + 0.5 * torch.tensor(torch.pi * 2 * t / 10).cos() for t in range(5)]
    assert [m["learning_rate"] for m in lines] == pytest.approx([1e-3 * float(c) for c in cosine], rel=1e-5)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["kl"] == lines[-1]["kl"] and "kl: " in (whole / "report.html").read_text()


def test_stopped_and_resumed_is_bitwise_the_same(tiny_judge, whole, tmp_path, monkeypatch):
    """After checkpoint 0 is gone, and with it the weights after the warm-up in any other place."""
    output, original = tmp_path / "run", Trainer.step
    more = [*BOTH, "--rollout.check_every", "1", "--save.keep", "1"]

    def interrupted(self):
        if self.state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    assert main(flags(tiny_judge, output, *more)) == 130
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["step-000003"]
    monkeypatch.setattr(Trainer, "step", original)
    assert main(flags(tiny_judge, output, *more, "--resume")) == 0
    assert metric_lines(output) == metric_lines(whole) and same_weights(output, whole)


def test_killed_between_the_reference_and_the_first_checkpoint(tiny_judge, whole, tmp_path, monkeypatch):
    """Such a run starts over: the warm-up and the reference are made again."""
    output, original = tmp_path / "run", Trainer.save
    more = [*BOTH, "--rollout.check_every", "1"]

    def killed(self):
        assert (self.run.folder.path / "reference").is_dir()  # before any checkpoint
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save", killed)
    assert main(flags(tiny_judge, output, *more)) == 130
    monkeypatch.setattr(Trainer, "save", original)
    assert main(flags(tiny_judge, output, *more, "--resume")) == 0
    assert metric_lines(output) == metric_lines(whole) and same_weights(output, whole)


def test_a_resume_without_a_reference_says_so(tiny_judge, whole, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    os.remove(output / "summary.json")
    shutil.rmtree(output / "reference")
    assert main(flags(tiny_judge, output, *BOTH, "--resume")) == 2
    assert "objective.kl_coef 0" in capsys.readouterr().err
    allowed = ("--resume", "--allow-changed")
    # A metric that cannot be had is no reason to stop a run: one of an earlier version has no reference.
    assert main(flags(tiny_judge, output, "--objective.kl_every", "1", "--train.steps", "6", *allowed)) == 0
    assert "the KL to the start is not measured" in capsys.readouterr().err
    assert len(steps(output)) == 6 and "kl" not in steps(output)[-1]


@pytest.mark.parametrize("left", [["checksums.json"], ["README"], []], ids=["checksums", "another file", "nothing"])
def test_a_reference_whose_weights_are_gone_is_named(tiny_judge, whole, tmp_path, left, capsys):
    """It is not taken for that of a run without a KL divergence, which has no such folder."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    os.remove(output / "summary.json")
    for file in (output / "reference").iterdir():
        if file.name not in left:
            file.unlink()
    for name in set(left) - {"checksums.json"}:
        (output / "reference" / name).write_text("")
    assert main(flags(tiny_judge, output, *BOTH, "--resume")) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{output / 'reference'} is damaged: " in said and "model.safetensors" in said and "copy" in said


@pytest.mark.parametrize(("every", "measured"), [("2", [2, 4, 5]), ("20", [5]), ("0", [])])
def test_measured_now_and_then_and_the_same_weights(tiny_judge, tmp_path, every, measured, monkeypatch):
    made, original = [], RefPolicy.__init__

    def counted(self, policy, temperature, resident):
        made.append(resident)
        original(self, policy, temperature, resident)

    monkeypatch.setattr(RefPolicy, "__init__", counted)
    output, never = tmp_path / "run", tmp_path / "never"
    assert main(flags(tiny_judge, output, "--objective.kl_every", every)) == 0
    assert [m["step"] for m in steps(output) if "kl" in m] == measured
    assert all(m["kl"] > 1e-6 for m in steps(output) if "kl" in m)
    # No copy of the weights unless one is asked for, and then none on the policy's device.
    assert made == ([False] if measured else [])
    assert (output / "reference").is_dir() == bool(measured)
    if every == "2":
        assert main(flags(tiny_judge, never, "--objective.kl_every", "0")) == 0
        assert same_weights(output, never)


@pytest.mark.parametrize("method", ["binary_rl", "sft"])
def test_other_methods(tiny_judge, tmp_path, method):
    """binary_rl takes part; given feedback has no rollouts to be near to, and the keys are not used."""
    output = tmp_path / "run"
    more = [*BOTH, "--method", method, "--supervised.prompts_per_step", "4", "--train.steps", "2"]
    assert main(flags(tiny_judge, output, *more, "--warmup.steps", "0")) == 0
    lines = steps(output, method)
    assert all({"kl", "loss/kl", "clip_ratio/region_mean"} <= m.keys() for m in lines) == (method == "binary_rl")
    assert any("kl" in m for m in lines) == (output / "reference").is_dir() == (method == "binary_rl")
    # One optimiser step per update without rollouts.
    assert lines[1]["learning_rate"] == pytest.approx(5e-4)


def test_nothing_to_train_on_is_no_error(tiny_judge, tmp_path):
    """A random model whose generated answers have no score: no rows, no ratio, no KL."""
    output = tmp_path / "run"
    more = ["--rollout.answer", "generated", "--train.steps", "2", "--warmup.steps", "0", "--train.give_up_after", "0"]
    assert main(flags(tiny_judge, output, *BOTH, *more)) == 0
    assert all(m["loss"] == 0 and m["kl"] is None and m["clip_ratio/region_mean"] is None for m in steps(output))


def test_a_gradient_that_is_not_finite_is_skipped_in_every_iteration(tiny_judge, tmp_path, monkeypatch):
    output, original, made = tmp_path / "run", PolicyGradient.loss, []

    def poisoned(*arguments):
        loss = original(*arguments)
        made.append(loss)

        def broken(hidden, weight, batch):
            out = loss(hidden, weight, batch)
            out.loss = out.loss * float("nan")
            return out

        return broken if len(made) in (3, 4) else loss  # one micro-batch in each of two iterations: the second step

    monkeypatch.setattr(PolicyGradient, "loss", poisoned)
    assert main(flags(tiny_judge, output, *BOTH, "--train.steps", "3")) == 0
    lines = steps(output)
    assert [m["skipped_steps"] for m in lines] == [0, 2, 2] and lines[1]["loss"] is None
    assert lines[2]["learning_rate"] == pytest.approx(0.75e-3)  # the schedule waits: 2 of 6 optimiser steps were taken
