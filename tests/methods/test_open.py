"""The registry is open: a method that the package does not know is one class and one row, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from real_fast.config import Config
from real_fast.methods.base import UpdateCounts
from real_fast.methods.policy_gradient import PolicyGradient, Scored
from real_fast.methods.registry import METHODS
from real_fast.train import main
from real_kernels import expected_score
from tests.conformance import (
    assert_gradient_is_the_slope,
    assert_independent_of_micro_batches,
    batches_of,
    float64_policy,
    make,
    total,
)
from tests.helpers import SCALE, flags, make_groups, metric_lines
from tests.oracles import naive_advantages


class RealAbsolute(PolicyGradient):
    """REAL with the reward -|y_hat - y|."""

    name = "real_absolute"

    def score(self, logp, batch):
        y_hat = expected_score(logp, self.values(logp), self.options.renormalize)
        reward = -(y_hat - batch.labels.to(logp.dtype)).abs()
        return Scored(reward.detach(), self.advantages(reward.detach(), batch), reward_gradient=reward)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(METHODS, RealAbsolute.name, RealAbsolute)


@pytest.mark.e2e
def test_a_new_method_trains_from_the_command_line(golden_model, tmp_path):
    output = tmp_path / "run"
    more = ["--method", "real_absolute", "--train.steps", "3", "--warmup.steps", "0", "--data.max_eval", "4"]
    assert main([*flags(golden_model, output), *more, "--eval.bootstrap", "10", "--eval.on_start", "false"]) == 0
    lines = [line for line in metric_lines(output) if line["phase"] != "eval"]
    assert [(line["phase"], line["step"]) for line in lines] == [("real_absolute", step) for step in (1, 2, 3)]
    for line in lines:
        assert -4 < line["reward"] < 0 and line["reward"] == pytest.approx(-line["score/mae"], rel=1e-5)
        assert {key for key in line if key.startswith("loss/")} == {"loss/exploration", "loss/refinement"}
        assert line["loss"] == pytest.approx(line["loss/exploration"] + line["loss/refinement"], rel=1e-5, abs=1e-6)
    assert "kl" in lines[-1]  # measured on the last step, as for every method on rollouts
    before, after = (load_file(folder / "model.safetensors") for folder in (golden_model, output / "final"))
    assert all(not torch.equal(before[key], after[key]) for key in before)


def test_its_gradient_is_that_of_plain_autograd_on_full_logits(tiny_llama):
    policy, groups = float64_policy(tiny_llama), make_groups(4, n=3, k=4, missing=True)
    method, values = make(RealAbsolute, {}), torch.tensor(SCALE.values, dtype=torch.float64)
    valid, want = UpdateCounts.of(groups).rollouts, torch.zeros((), dtype=torch.float64)
    for group in groups:
        texts, rewards = [], []
        for rollout in (r for r in group.rollouts if r.has_score):
            ids = torch.tensor([[*group.prompt_ids, *rollout.context_ids]])
            logp = policy.model(ids).logits[0].log_softmax(-1)
            start = len(group.prompt_ids) - 1
            texts.append(sum(logp[start + i, token] for i, token in enumerate(rollout.sampled_ids)))
            rewards.append(-((logp[-1, list(SCALE.score_ids)].exp() * values).sum() - group.label).abs())
        advantages = naive_advantages([float(r.detach()) for r in rewards], "leave_one_out", True, 1.0)
        for text, reward, a in zip(texts, rewards, advantages, strict=True):
            want = want - (a * text + reward) / valid
    policy.zero_grad()
    want.backward()
    want_grads = {name: p.grad.clone() for name, p in policy.named_parameters()}
    loss, grads, _ = total(policy, method, groups, batches_of(method, groups, budget=60))
    torch.testing.assert_close(loss, want.detach(), rtol=1e-6, atol=0)
    assert grads.keys() == want_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[name], rtol=1e-6, atol=1e-12)


def test_it_conforms(tiny_llama):
    policy = float64_policy(tiny_llama)
    assert_independent_of_micro_batches(policy, RealAbsolute, {})
    assert_gradient_is_the_slope(policy, RealAbsolute, {})


def test_an_unknown_method_is_one_clear_line(tmp_path, capsys):
    assert Config().method == "real"
    assert main(["--model", "nowhere", "--output", str(tmp_path / "run"), "--method", "real_absolut"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("real-fast train: error: method is 'real_absolut': ")
    assert "did you mean real_absolute?" in error[0] and all(name in error[0] for name in METHODS)
    assert not (tmp_path / "run").exists()
