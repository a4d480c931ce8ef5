"""QLoRA: adapters over weights in 4 bits, on the CPU."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from real_fast.config import Config, LoraConfig, ObjectiveConfig, OptimConfig, SaveConfig, TrainConfig
from real_fast.errors import ConfigError
from real_fast.methods.base import UpdateCounts
from real_fast.model import lora, nf4
from real_fast.model.load import load_tokenizer
from real_fast.model.policy import Policy
from real_fast.rollout.transformers_engine import TransformersEngine
from real_fast.score.scale import ScoreScale
from real_fast.train import main
from real_fast.training.optim import build_optimizer, clip_and_step
from real_fast.training.setup import load_policy
from real_fast.types import SamplingParams
from tests.golden.trajectories import run_flags
from tests.helpers import make_groups, make_method

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
PLAIN = ObjectiveConfig(normalize_std=False)


def settings(model, precision="fp32"):
    train = TrainConfig(device="cpu", precision=precision, lora=LoraConfig(r=4, alpha=8), quantization="nf4")
    return Config(model=str(model), output="out", train=train)


def gradients(policy, groups):
    from real_fast.batching.micro_batches import micro_batches

    policy.zero_grad()
    loss_of = make_method("real", PLAIN).loss(UpdateCounts.of(groups))
    for batch in micro_batches(groups, 10**6, 0, True):
        policy(batch, loss_of).loss.backward()
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


def packed(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if nf4.is_packed(p)}


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("nf4")
    tiny_llama().save_pretrained(path)
    return path


@pytest.fixture
def policy(folder):
    torch.manual_seed(0)
    policy = load_policy(settings(folder), None).train()
    for name, parameter in policy.model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


def test_gradients_are_those_of_the_unpacked_weights_merged(policy, tiny_llama):
    assert len(packed(policy.model)) == 2 * 7 and policy.model.lm_head.weight.dtype == torch.float32
    plain = tiny_llama()
    missing = plain.load_state_dict(dict(lora.merged_tensors(policy.model)))
    assert not missing.missing_keys
    groups = make_groups(3, n=4)
    got, want = gradients(policy, groups), gradients(Policy(plain, attention="sdpa").train(), groups)
    own = dict(policy.model.named_parameters())
    for name in [name for name in got if ".lora_A." in name]:
        layer, other = name.split(".lora_A.")[0], name.replace(".lora_A.", ".lora_B.")
        dw, a, b = want[f"{layer}.weight"].double(), own[name].double(), own[other].double()
        for grad, expected in ((got[name], 2 * b.T @ dw), (got[other], 2 * dw @ a.T)):
            assert float((grad - expected).norm() / expected.norm()) < 1e-5
    assert len(got) == 2 * 2 * 7


def kept_bytes(policy, groups):
    """What autograd keeps of a forward pass, parameters not counted."""
    known, seen = {p.untyped_storage()._cdata for p in policy.parameters()}, {}
    alive = []  # or another tensor could take over a storage's address

    def pack(x):
        alive.append(x)
        if x.untyped_storage()._cdata not in known:
            seen[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        gradients(policy, groups)
    return sum(seen.values())


def test_in_bf16_no_more_is_kept_for_the_backward_pass_than_over_weights_in_16_bits(folder):
    """bitsandbytes would widen every answer to float32, since what comes out of a norm is."""
    kept = []
    for quantization in ("nf4", "none"):
        config = settings(folder, "bf16")
        config.train.quantization = quantization
        kept.append(kept_bytes(load_policy(config, None).train(), make_groups(1, n=1)))
    assert kept[0] == pytest.approx(kept[1], rel=0.02)


def test_sampling_and_training_leave_the_packed_weights_as_they_are(policy, golden_model):
    """On a CPU with bf16 instructions bitsandbytes would pack them anew to sample, and then give no gradient."""
    before, groups = packed(policy.model), make_groups(1, n=1)
    wanted = gradients(policy, groups)
    tokenizer = load_tokenizer(str(golden_model))
    scale = ScoreScale.from_tokenizer(tokenizer, [1, 2, 3], "Score: ")
    engine = TransformersEngine(policy.model, tokenizer, scale)
    engine.generate([[5, 6, 7]], SamplingParams(n=2, max_tokens=4, temperature=1.0, top_p=1.0, answer="forced", seed=0))
    found = gradients(policy, groups)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    optimizer = build_optimizer(policy.model, OptimConfig(lr=1e-2))
    for _ in range(5):
        gradients(policy, groups)
        assert clip_and_step(policy, optimizer, 1.0)[1]
    after = packed(policy.model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_what_is_trained_is_counted_over_the_numbers_that_weights_stand_for(policy, tiny_llama):
    total = sum(p.numel() for p in policy.parameters() if p.requires_grad) + tiny_llama().num_parameters()
    assert f" of {total:,} (" in lora.describe(policy.model)


def test_settings_that_cannot_work(tmp_path, monkeypatch):
    config = settings(tmp_path)
    config.data.train = "rows.jsonl"
    config.validate()
    config.save = SaveConfig(merge=True)
    with pytest.raises(ConfigError, match=r"leave save\.merge out"):
        config.validate()
    config.save, config.train.lora = SaveConfig(), None
    with pytest.raises(ConfigError, match=r"weights in 4 bits cannot be trained: train adapters \(train\.lora\)"):
        config.validate()
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes.*pip install 'real-fast\[bitsandbytes\]'"):
        nf4.quantization(torch.float32)


@pytest.mark.e2e
def test_a_run_and_its_resume(golden_model, tmp_path):
    output = tmp_path / "run"
    flags = run_flags(golden_model, output, "--train.lora.r", "4", "--train.quantization", "nf4", "--warmup.steps", "0")
    flags += ["--train.steps", "2", "--save.every", "1", "--optim.lr", "1e-2", "--optim.lr_warmup_steps", "0"]
    assert main(flags) == 0
    want = load_file(output / "final" / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in want.items() if "lora_B" in name)
    for path in ("final", "checkpoints/step-000002"):
        shutil.rmtree(output / path)
    (output / "summary.json").unlink()
    assert main([*flags, "--resume"]) == 0
    found = load_file(output / "final" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], want[name]) for name in want)
