"""train.compile and train.liger: numbers of the model's own layers, one compilation for all lengths, refusals."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    AttentionInterface,
    GemmaConfig,
    GemmaForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from real_fast.attention.interface import NAME, attend
from real_fast.batching.micro_batches import micro_batches
from real_fast.config import Config, LoraConfig
from real_fast.errors import ConfigError
from real_fast.model import liger
from real_fast.model.compiled import CompiledLayers, check_compiler
from real_fast.model.liger import LigerLayers
from real_fast.model.lora import add_adapters
from real_fast.model.masters import WorkingWeights
from real_fast.model.policy import Policy
from real_fast.model.ref_policy import RefPolicy
from real_fast.train import main
from real_fast.training.setup import settled
from real_fast.training.trial import check_faster
from tests.helpers import LONG, flags, make_groups, metric_lines

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@pytest.fixture(autouse=True)
def nothing_compiled_is_left():
    yield
    assert AttentionInterface()[NAME] is attend
    torch._dynamo.reset()


def gradients(policy, batch):
    """Gradients of everything, of a loss that weighs every hidden state and the head."""
    policy.train().zero_grad()
    with policy.working():
        out = policy(batch, lambda hidden, weight, batch: (hidden @ weight.T).float().tanh().mean())
        out.backward()
    return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.requires_grad}


def nonzero(model):
    """Adapters that change something, as behind an update."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def same(found, want, bound=1e-5):
    assert found.keys() == want.keys()
    for name, gradient in want.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error <= bound, (name, float(error))


def batches(shared=True, n=2, k=4):
    """Micro-batches of different lengths."""
    return [micro_batches(make_groups(seed, n=n, k=k), LONG, 0, shared)[0] for seed in range(3)]


# What a graph computes is inductor's to get right once; the rest is how layers are cut into graphs, which is as slow.
@pytest.mark.parametrize(("checkpointing", "backend"), [(False, "inductor"), (True, "eager")])
def test_compiled_layers_have_the_models_gradients(tiny_llama, checkpointing, backend):
    model = tiny_llama(layers=2 if checkpointing else 1)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = Policy(model, attention="sdpa")
    want = [gradients(policy, batch) for batch in batches()]
    policy.faster = CompiledLayers(model, backend)
    counters.clear()
    found, graphs = [], []
    for batch in batches():
        found.append(gradients(policy, batch))
        graphs.append(counters["stats"]["unique_graphs"])
    for a, b in zip(found, want, strict=True):
        same(a, b)
    assert graphs[0] > 0 and set(graphs) == {graphs[0]}, "another length, another layer: compiled anew"


def test_padded_batches_compile_once_too(tiny_llama):
    policy = Policy(tiny_llama(layers=1))
    want = [gradients(policy, batch) for batch in batches(shared=False)[:2]]
    policy.faster = CompiledLayers(policy.model, "eager")
    counters.clear()
    for batch, expected in zip(batches(shared=False)[:2], want, strict=True):
        same(gradients(policy, batch), expected)
        assert counters["stats"]["unique_graphs"] == 1


def test_layers_are_the_models_own_outside_an_update(tiny_llama):
    """Sampling, evaluating and saving see a model that nothing was done to."""
    model = tiny_llama(layers=1)
    policy = Policy(model, attention="sdpa")
    names = list(model.state_dict())
    policy.faster = CompiledLayers(model, "eager")
    layer, batch = model.model.layers[0], batches()[0]
    assert layer._compiled_call_impl is None
    policy.begin_step()
    policy(batch, lambda hidden, weight, batch: hidden.sum()).backward()
    assert layer._compiled_call_impl is not None  # the backward pass of activation checkpointing is in here too
    policy.end_step()
    assert layer._compiled_call_impl is None and list(model.state_dict()) == names
    with torch.no_grad():
        policy(batch, lambda hidden, weight, batch: hidden)  # as a reference is asked, without a step
    assert layer._compiled_call_impl is None


def test_the_reference_has_faster_layers_of_its_own(tiny_llama):
    policy = Policy(tiny_llama(layers=1), attention="sdpa").train()
    policy.faster = CompiledLayers(policy.model, "eager")
    reference = RefPolicy(policy, 1.0, resident=True)
    faster = reference.policy.faster
    assert isinstance(faster, CompiledLayers) and faster.backend == "eager" and faster is not policy.faster
    assert reference.policy.work is None
    policy.faster = None
    (want,) = RefPolicy(policy, 1.0, resident=True).logprobs(batches()[:1])
    counters.clear()
    (found,) = reference.logprobs(batches()[:1])
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
    assert counters["stats"]["unique_graphs"] > 0


class Wrong:
    """Layers that compute something else, or nothing."""

    name = "train.wrong"

    def __init__(self, model, what):
        self.layer, self.what = model.model.layers[0], what

    def on(self):
        self.layer.mlp.__dict__["forward"] = self.forward

    def off(self):
        self.layer.mlp.__dict__.pop("forward", None)

    def forward(self, x):
        out = type(self.layer.mlp).forward(self.layer.mlp, x)
        if self.what == "fails":
            # As torch.compile does: the innermost cause is a command's end, and the one around it has what was said.
            end = subprocess.CalledProcessError(1, ["g++", "-error:", "f.cpp"])
            said = AssertionError("cc1plus: in f.cpp\nf.cpp:1: fatal error: Python.h: No such file\n")
            said.__cause__ = end
            raise RuntimeError("backend='x' raised:\nmore") from said
        if self.what == "says nothing":
            raise OSError("")
        if self.what == "gradients":
            return out.detach()
        return 1.1 * out if self.what == "hidden states" else out


@pytest.mark.parametrize("what", ["hidden states", "gradients", "fails", "says nothing", "right"])
@pytest.mark.parametrize("kind", ["shared", "padded", "fused head", "all on the host", "adapters"])
def test_what_computes_something_else_is_refused(tiny_llama, what, kind):
    """And nothing is left behind: no gradient, no mode, no other layers."""
    model = tiny_llama(initializer_range=0.3)
    work = None
    if kind == "adapters":
        add_adapters(model, LoraConfig(r=4), "base")
        nonzero(model)
    elif kind not in ("shared", "padded"):
        work = WorkingWeights(model, CPU, None, kind == "all on the host", fused_head=True)
    policy = Policy(model, None, None if kind == "padded" else "sdpa", work)
    policy.faster = Wrong(model, what)
    if what == "right":
        check_faster(policy, 0)
    else:
        message = {
            "fails": r"does not work for this model on this machine \(AssertionError: f\.cpp:1: fatal error: Python\.h",
            "says nothing": r"train\.wrong does not work .* \(OSError: no reason given\): leave it out",
            "hidden states": r"train\.wrong changes this model's hidden states by 0\.",
            "gradients": r"train\.wrong changes this model's gradients by [01]",
        }
        with pytest.raises(ConfigError, match=message[what]):
            check_faster(policy, 0)
    assert all(p.grad is None for p in model.parameters()) and not model.training
    assert "forward" not in vars(model.model.layers[0].mlp)


def test_an_interrupted_reference_leaves_the_models_own_layers(tiny_llama):
    model = tiny_llama(layers=1)
    policy = Policy(model, attention="sdpa")
    policy.faster = Wrong(model, "fails")
    with torch.no_grad(), pytest.raises(RuntimeError):
        policy(batches()[0], lambda hidden, weight, batch: hidden)
    assert "forward" not in vars(model.model.layers[0].mlp)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("what", ["adapters", "working weights"])
def test_compiled_layers_serve_adapters_and_working_weights(tiny_llama, what, checkpointing):
    model, work = tiny_llama(), None
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if what == "adapters":
        add_adapters(model, LoraConfig(r=4), "base")
        nonzero(model)
    else:
        work = WorkingWeights(model, CPU, torch.bfloat16, fused_head=False)
    policy = Policy(model, None if work is None else torch.bfloat16, "sdpa", work)
    want = [gradients(policy, batch) for batch in batches()[:2]]
    policy.faster = CompiledLayers(model, "eager")
    for batch, expected in zip(batches()[:2], want, strict=True):
        same(gradients(policy, batch), expected)


def test_a_run_with_compiled_layers_is_the_run_without(tiny_judge, tmp_path, monkeypatch):
    def eager(model):
        return CompiledLayers(model, "eager")

    monkeypatch.setattr("real_fast.training.setup.CompiledLayers", eager)
    few = ["--train.precision", "fp32", "--train.steps", "2", "--objective.kl_coef", "0.1", "--eval.on_start", "false"]
    assert main(flags(tiny_judge, tmp_path / "own", *few)) == 0
    assert main(flags(tiny_judge, tmp_path / "compiled", *few, "--train.compile")) == 0
    for a, b in zip(metric_lines(tmp_path / "own"), metric_lines(tmp_path / "compiled"), strict=True):
        assert a.keys() == b.keys()
        for name in ("loss", "grad_norm", "kl"):
            assert (name in a) == (name in b)
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), rel=1e-4, abs=1e-6)
    assert any("grad_norm" in line and "kl" in line for line in metric_lines(tmp_path / "compiled"))


def test_a_machine_that_cannot_compile_is_named(monkeypatch):
    check_compiler(CPU)
    cpp_builder = importlib.import_module("torch._inductor.cpp_builder")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    getattr(cpp_builder.cpp_compiler_search, "cache_clear", lambda: None)()
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"train\.compile needs a C\+\+ compiler on a CPU, .*: install g\+\+"):
        check_compiler(CPU)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"CXX is 'no-such-compiler', which is none that runs: unset CXX"):
        check_compiler(CPU)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(ConfigError, match=r"TORCHDYNAMO_DISABLE=1 switches torch\.compile off"):
        check_compiler(CPU)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(ConfigError, match=r"train\.compile needs Triton on a GPU"):
        check_compiler(torch.device("cuda"))


def test_models_that_cannot_be_compiled_are_named():
    experts = Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    with pytest.raises(ConfigError, match=r"does not serve mixtures of experts \(qwen3_moe\)"):
        CompiledLayers(Qwen3MoeForCausalLM(experts))
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=64, bos_token_id=1, eos_token_id=2))
    model.transformer.h = torch.nn.ModuleList()
    with pytest.raises(ConfigError, match=r"does not know the layers of a gpt2 model"):
        CompiledLayers(model)


def test_both_at_once_are_refused():
    config = Config(model="m", output="o")
    config.data.train = ["rows.jsonl"]
    config.train.compile = config.train.liger = True
    with pytest.raises(ConfigError, match=r"train\.compile and train\.liger are both on"):
        settled(config).validate()


@pytest.mark.parametrize(
    ("kind", "shared", "adapters"), [("llama", False, False), ("qwen3", True, False), ("llama", True, True)]
)
def test_liger_has_the_models_gradients(tiny_llama, interpreted_liger, kind, shared, adapters):
    """In fp32: the interpreter knows no arithmetic in bf16."""
    model = tiny_llama(layers=1) if kind == "llama" else Qwen3ForCausalLM(Qwen3Config(**SMALL))
    if adapters:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        add_adapters(model, LoraConfig(r=4), "base")
        nonzero(model)
    policy = Policy(model, attention="sdpa" if shared else None)
    batch = batches(shared, n=1, k=2)[0]
    want = gradients(policy, batch)
    policy.faster = LigerLayers(model)
    same(gradients(policy, batch), want)
    policy.faster.on()
    kinds = {m._get_name() for m in model.modules()}
    assert {"LigerRMSNorm", "LigerSwiGLUMLP"} <= kinds
    policy.faster.off()


def test_liger_leaves_other_models_alone(tiny_llama, interpreted_liger):
    """And this one too, outside an update."""
    module = sys.modules[type(tiny_llama()).__module__]
    before, model = dict(vars(module)), tiny_llama()
    own = [dict(vars(m)) for m in model.modules()]
    faster = LigerLayers(model)
    assert vars(module) == before and [dict(vars(m)) for m in model.modules()] == own
    faster.on()
    faster.on()
    assert module.apply_rotary_pos_emb is not before["apply_rotary_pos_emb"]
    other = faster.of(tiny_llama(seed=1))
    other.on()
    other.off()
    assert module.apply_rotary_pos_emb is not before["apply_rotary_pos_emb"]
    faster.off()
    faster.off()
    assert vars(module) == before and [dict(vars(m)) for m in model.modules()] == own


def test_liger_is_tried_before_work_starts(tiny_llama, interpreted_liger, monkeypatch):
    policy = Policy(tiny_llama(layers=1), attention="sdpa")
    policy.faster = LigerLayers(policy.model)
    check_faster(policy, 0)
    norms = importlib.import_module("liger_kernel.ops.rms_norm")
    tl = importlib.import_module("triton.language")
    monkeypatch.setattr(norms, "rsqrt", lambda x: 1.01 * tl.rsqrt(x))
    with pytest.raises(ConfigError, match=r"train\.liger changes this model's hidden states by 0\.0"):
        check_faster(policy, 0)


def test_where_liger_cannot_serve_is_named(monkeypatch):
    pytest.importorskip("liger_kernel", reason="Liger is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"train\.liger needs a GPU, and this run is on cpu"):
        liger.import_liger(CPU)
    with pytest.raises(ConfigError, match=r"Liger has no swiglu for a gemma model"):
        LigerLayers(GemmaForCausalLM(GemmaConfig(**SMALL)))
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=64, bos_token_id=1, eos_token_id=2))
    with pytest.raises(ConfigError, match=r"Liger has no kernels for a gpt2 model, but for .*qwen3"):
        LigerLayers(model)
    glm = Glm4ForCausalLM(Glm4Config(**SMALL))
    module, norm = sys.modules[type(glm).__module__], glm.model.norm
    before, own = dict(vars(module)), dict(vars(norm))
    with pytest.raises(ConfigError, match=r"Liger cannot serve a glm4 model \(NotImplementedError: .*\): leave it out"):
        LigerLayers(glm)
    assert vars(module) == before and vars(norm) == own
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    with pytest.raises(ConfigError, match=r"needs liger-kernel, .*pip install 'real-fast\[liger\]'"):
        liger.import_liger(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("faster", [CompiledLayers, LigerLayers])
@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_faster_layers_on_a_gpu(tiny_llama, faster, half):
    if faster is LigerLayers:
        pytest.importorskip("liger_kernel", reason="Liger is not installed")
    model = tiny_llama(hidden_size=128).cuda()
    policy = Policy(model, half, "varlen" if half else "sdpa")
    batch = batches()[0].to(torch.device("cuda"))
    want = gradients(policy, batch)
    policy.faster = faster(model)
    same(gradients(policy, batch), want, 0.05 if half else 1e-4)
    check_faster(policy, 0)
