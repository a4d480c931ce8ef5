"""AdamW in its kinds, and what is refused of weights without float32 masters."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from real_fast.config import Config, OptimConfig
from real_fast.distributed.slices import TensorFiles
from real_fast.errors import ConfigError
from real_fast.runs.optimizer_state import metadata, restore, tensors_of
from real_fast.train import main
from real_fast.training import adamw
from real_fast.training.optim import build_optimizer, build_scheduler
from real_fast.training.preflight import check_rates
from real_fast.training.setup import load_policy
from tests.golden.trajectories import run_flags


def layer():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 8))  # 6144 numbers: 8 bits from 4096 on


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_moments_on_the_host_change_no_bit(name):
    found = []
    for offload in ("none", "moments"):
        model = layer()
        optimizer = build_optimizer(model, OptimConfig(name=name, offload=offload, lr=1e-3))
        train(model, optimizer, 3)
        found.append((weights(model), dict(tensors_of(model, optimizer))))
    (a, state), (b, other) = found
    assert torch.equal(a, b) and state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)


@pytest.mark.parametrize("offload", ["none", "moments"])
def test_moments_in_8_bits_go_on_exactly(tmp_path, offload):
    config = OptimConfig(name="adamw8bit", offload=offload, lr=1e-3, schedule="cosine")
    model, other = layer(), layer()
    optimizer = build_optimizer(model, config)
    train(model, optimizer, 3)
    tensors = dict(tensors_of(model, optimizer))
    assert {"0.weight:exp_avg:codes", "0.weight:exp_avg_sq:scale", "0.bias:exp_avg"} <= tensors.keys()
    assert tensors["0.weight:exp_avg:codes"].dtype == torch.uint8
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata(optimizer))
    other.load_state_dict(model.state_dict())
    again = build_optimizer(other, config)
    assert restore(other, again, TensorFiles([tmp_path / "a.safetensors"])) == []
    train(model, optimizer, 2, start=3)
    train(other, again, 2, start=3)
    assert torch.equal(weights(model), weights(other))


def test_8_bits_are_near_32():
    moved = []
    for name in ("adamw", "adamw8bit"):
        model = layer()
        before = weights(model).clone()
        train(model, build_optimizer(model, OptimConfig(name=name, lr=1e-3)), 5)
        moved.append(weights(model) - before)
    error = float((moved[1] - moved[0]).norm() / moved[0].norm())
    assert 0 < error < 0.2


def test_the_schedule_reaches_torchao():
    """Whose learning rate is a tensor that must stay one."""
    model, config = layer(), OptimConfig(name="adamw8bit", lr=1e-3, lr_warmup_steps=4)
    optimizer = build_optimizer(model, config)
    scheduler = build_scheduler(optimizer, config, 10)
    rates = []
    for _ in range(3):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        train(model, optimizer, 1)
        scheduler.step()
    assert rates == pytest.approx([0.0, 2.5e-4, 5e-4])


@pytest.mark.parametrize(("name", "other"), [("adamw", "adamw8bit"), ("adamw8bit", "adamw")])
def test_another_optimisers_state_is_refused(tmp_path, name, other):
    model = layer()
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=1e-3))
    train(model, optimizer, 1)
    save_file(dict(tensors_of(model, optimizer)), tmp_path / "a.safetensors", metadata=metadata(optimizer))
    with pytest.raises(ValueError, match=r"0\.weight:exp_avg is of another kind"):
        restore(model, build_optimizer(model, OptimConfig(name=other)), TensorFiles([tmp_path / "a.safetensors"]))


def test_torchao_is_named_where_it_is_missing(monkeypatch):
    adamw._adamw8bit.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ConfigError, match=r"optim\.name is adamw8bit.*pip install 'real-fast\[torchao\]'"):
        adamw.adamw("adamw8bit")
    assert adamw.adamw("adamw") is adamw.AdamW


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rate", [1e-6, 3e-5, 1e-3])
def test_the_share_of_weights_that_a_rate_moves(dtype, rate):
    """Against the addition itself, away from 0, in float64."""
    model = torch.nn.Linear(200, 50, bias=False)
    torch.nn.init.normal_(model.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    model.to(dtype)
    weight = model.weight.detach().double()
    share = 100 * float(((weight + weight.sign() * rate).to(dtype).double() != weight).double().mean())
    if share < 50:
        with pytest.raises(ConfigError, match=rf"optim\.lr is {rate:g}.* move {share:.1f} % .*fp32"):
            check_rates(model, {"optim.lr": rate})
    else:
        check_rates(model, {"optim.lr": rate})
    check_rates(model.float(), {"optim.lr": rate})


def test_bf16_weights_are_refused_at_the_rates_of_rl(golden_model):
    def policy(**changes):
        config = Config(model=str(golden_model))
        config.train.weights, config.train.precision, config.train.shared_prompt = "bf16", "bf16", False
        for key, value in changes.items():
            setattr(config.optim if key == "lr" else config.train, key, value)
        return load_policy(config, None)

    with pytest.raises(ConfigError, match=r"train\.weights is bf16 and optim\.lr is 1e-06"):
        policy()
    with pytest.raises(ConfigError, match=r"train\.precision fp32"):
        policy(precision="fp32", lr=0.1)
    found = policy(lr=0.1)
    assert found.model.dtype == torch.bfloat16 and found.autocast_dtype is None and found.work is None


@pytest.mark.e2e
def test_a_run_in_less_memory_resumes_to_the_last_bit(golden_model, tmp_path):
    """With everything at once: 8 bits, everything on the host, 16-bit copies, the head's gradient summed in place."""
    less = ["--optim.name", "adamw8bit", "--optim.offload", "all", "--train.precision", "bf16"]
    less += ["--train.head_gradient", "fused", "--warmup.steps", "1", "--rollout.check_every", "0"]
    less += ["--train.steps", "3", "--save.every", "1", "--save.keep", "9"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert main(run_flags(golden_model, whole, *less)) == 0
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step-000003")
    assert main(run_flags(golden_model, again, *less, "--resume")) == 0
    for name in ("model", "optimizer"):  # in float32, where final/ is in bf16
        a, b = (load_file(run / "checkpoints" / "step-000003" / f"{name}.safetensors") for run in (whole, again))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
