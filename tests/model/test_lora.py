"""Adapters: their gradients, their files, what stays untouched, and whole runs that train them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import profile
from transformers import AutoModelForCausalLM

from real_fast.batching.micro_batches import micro_batches
from real_fast.config import Config, LoraConfig, ObjectiveConfig, OptimConfig, TrainConfig
from real_fast.errors import ConfigError, ModelError
from real_fast.methods.base import UpdateCounts
from real_fast.model import lora
from real_fast.model.load import load_model, load_tokenizer
from real_fast.model.policy import Policy
from real_fast.model.ref_policy import RefAdapters, RefPolicy
from real_fast.rollout.engine import publish
from real_fast.train import main
from real_fast.training.optim import build_optimizer, clip_and_step
from real_fast.training.setup import load_policy
from real_fast.utils.jsonio import read_jsonl
from tests.golden.trajectories import run_flags
from tests.helpers import LONG, make_groups, make_method, metric_lines

peft = pytest.importorskip("peft")
CPU = torch.device("cpu")
# A group's standard deviation divides, and would blow up the rounding of small differences.
PLAIN = ObjectiveConfig(normalize_std=False)


def adapted(tiny_llama, seed=1, r=4, trained=True, base="base", targets="all-linear", **model):
    """A tiny model with adapters; of trained ones, B is not 0."""
    found = tiny_llama(**model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lora.add_adapters(found, LoraConfig(r=r, alpha=8, targets=targets), base)
        for name, parameter in found.named_parameters():
            if trained and ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return found


def merged(model, tiny_llama, **shape):
    """A plain model with the merged weights."""
    plain = tiny_llama(seed=9, **shape)
    plain.load_state_dict(dict(lora.merged_tensors(model)), strict=False)
    return plain


def update(policy, groups):
    policy.zero_grad()
    loss_of, total = make_method("real", PLAIN).loss(UpdateCounts.of(groups)), 0.0
    for batch in micro_batches(groups, LONG, 0, policy.attention is not None):
        out = policy(batch, loss_of)
        out.loss.backward()
        total += float(out.loss.detach())
    return total


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", None])
def test_gradients_are_the_merged_models_projected(tiny_llama, tied, attention):
    """dA = s B' dW and dB = s dW A' with the gradient dW of the merged weight, of whatever layout."""
    model = adapted(tiny_llama, tied=tied)
    policy = Policy(model, attention=attention).train()
    plain = Policy(merged(model, tiny_llama, tied=tied), attention=attention).train()
    groups = make_groups(3, n=4)
    assert abs(update(policy, groups) - update(plain, groups)) < 1e-5
    weights, scale = dict(plain.model.named_parameters()), 8 / 4
    own = dict(model.named_parameters())
    layers = [name.removesuffix(".lora_A.default.weight") for name in own if name.endswith("lora_A.default.weight")]
    assert len(layers) == 2 * 7
    for layer in layers:
        dw = weights[f"{layer}.weight"].grad.double()
        a, b = own[f"{layer}.lora_A.default.weight"], own[f"{layer}.lora_B.default.weight"]
        for got, want in ((a.grad, scale * b.double().T @ dw), (b.grad, scale * dw @ a.double().T)):
            assert want.norm() > 1e-6 and float((got - want).norm() / want.norm()) < 1e-5
    others = [name for name, p in own.items() if p.requires_grad and ".lora_" not in name]
    assert not others and all(p.grad is None for p in own.values() if not p.requires_grad)


def test_a_frozen_head_makes_no_gradient_of_its_size(tiny_llama):
    """Nothing as large as [V, D] is allocated in an update, and something is where the head is trained."""
    shape = {"vocab_size": 20000, "hidden_size": 128, "layers": 1}
    groups = make_groups(0, n=1)

    def largest(model):
        policy = Policy(model, attention="sdpa").train()
        with profile(profile_memory=True) as found:
            update(policy, groups)
        return max(e.nbytes() for e in found.profiler.kineto_results.events() if e.name() == "[memory]")

    size = 20000 * 128 * 4
    assert largest(tiny_llama(**shape)) >= size
    assert largest(adapted(tiny_llama, **shape)) < size


class Copy:
    """An engine with a model of its own, which gets merged weights."""

    def __init__(self, model):
        self.model = model

    def sync_adapters(self, model):
        own = dict(self.model.named_parameters())
        for name, tensor in lora.merged_tensors(model, torch.bfloat16):
            own[name].data.copy_(tensor)


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_the_base_is_the_same_to_the_last_bit_after_fifty_steps_with_sync(tiny_llama, half):
    base = tiny_llama().to(half or torch.float32)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    lora.add_adapters(base, LoraConfig(r=4), "base")
    policy, engine = Policy(base, half, "sdpa").train(), Copy(tiny_llama(seed=3))
    optimizer = build_optimizer(policy.model, OptimConfig(lr=1e-2))
    reference = RefAdapters(policy, 1.0)
    groups = make_groups(1, n=1)
    for _ in range(50):
        reference.logprobs(micro_batches(groups, LONG, 0, True))
        update(policy, groups)
        assert clip_and_step(policy, optimizer, 1.0)[1]
        publish(engine, policy.model)
    after = {name.replace(".base_layer", ""): t for name, t in base.state_dict().items() if ".lora_" not in name}
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    moved = dict(engine.model.named_parameters())["model.layers.0.self_attn.q_proj.weight"]
    assert (moved - before["model.layers.0.self_attn.q_proj.weight"].float()).norm() > 0.1


def test_merging_is_exact_and_rounds_once(tiny_llama):
    model = adapted(tiny_llama, tied=True)
    tensors, own = dict(lora.merged_tensors(model, torch.bfloat16)), model.state_dict()
    assert tensors.keys() == dict(tiny_llama(tied=True).named_parameters()).keys()
    layer = "model.layers.1.mlp.down_proj"
    a, b = own[f"{layer}.lora_A.default.weight"].double(), own[f"{layer}.lora_B.default.weight"].double()
    want = own[f"{layer}.base_layer.weight"].double() + 2 * b @ a
    assert tensors[f"{layer}.weight"].dtype == torch.bfloat16
    assert (tensors[f"{layer}.weight"] != want.float().bfloat16()).float().mean() < 0.01
    torch.testing.assert_close(tensors[f"{layer}.weight"].double(), want, rtol=2**-8, atol=1e-7)


def test_pefts_own_reader_takes_the_folder(tiny_llama, tmp_path):
    model = adapted(tiny_llama, base=str(tmp_path / "base"))
    tiny_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    lora.save_adapters(model, tmp_path / "adapter")
    ids = torch.arange(4, 30)[None]
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert torch.equal(theirs(ids).logits, model(ids).logits)
    ours = load_model(str(tmp_path / "adapter"), CPU, torch.float32)
    assert torch.equal(ours(ids).logits, model(ids).logits)
    whole = lora.merge(ours)
    assert not lora.is_adapted(whole) and all(p.requires_grad for p in whole.parameters())
    assert whole.state_dict().keys() == tiny_llama().state_dict().keys()
    torch.testing.assert_close(whole(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)


def test_an_adapter_that_peft_wrote_is_read(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], use_rslora=True, init_lora_weights=False
    )
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(4, 30)[None]
    want = theirs(ids).logits
    assert torch.equal(load_model(str(tmp_path / "adapter"), CPU, torch.float32)(ids).logits, want)


def test_the_reference_is_the_model_with_adapters_off(tiny_llama):
    """Of adapters that the phase starts with untrained: what the base says, whatever they are now."""
    policy = Policy(adapted(tiny_llama, trained=False), torch.bfloat16, "sdpa").train()
    batches = micro_batches(make_groups(), LONG, 0, True)
    want = RefPolicy(Policy(tiny_llama(), torch.bfloat16, "sdpa"), 0.7, resident=True).logprobs(batches)
    reference = RefAdapters(policy, 0.7)
    assert reference.state is None
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    assert torch.equal(reference.logprobs(batches)[0], want[0])
    assert policy.training and sum(p.requires_grad for p in policy.parameters()) == 2 * 2 * 7


def test_a_reference_of_trained_adapters_keeps_these(tiny_llama, tmp_path):
    """After a warm-up, or behind another run: what the policy said then."""
    policy = Policy(adapted(tiny_llama), None, "sdpa").train()
    batches = micro_batches(make_groups(), LONG, 0, True)
    reference = RefAdapters(policy, 1.0)
    (want,) = reference.logprobs(batches)
    reference.save(tmp_path)
    now = [parameter.add_(0.1) for parameter in (p.data for p in policy.parameters() if p.requires_grad)]
    other = RefAdapters(policy, 1.0)
    assert not torch.equal(other.logprobs(batches)[0], want)
    other.load(tmp_path)
    for one in (reference, other):
        assert torch.equal(one.logprobs(batches)[0], want)
    assert all(torch.equal(a, p) for a, p in zip(now, (p for p in policy.parameters() if p.requires_grad), strict=True))


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "lm_head"], r"names the head \(lm_head\).*would pass over"),
        ("embed_tokens", "embed_tokens, a Embedding, which is no linear layer"),
        (["q_prj"], r"q_prj, no layer of this model: it has down_proj, .*q_proj"),
    ],
)
def test_targets_that_cannot_have_adapters(tiny_llama, targets, said):
    with pytest.raises(ConfigError, match=said):
        adapted(tiny_llama, targets=targets)


def test_settings_that_cannot_work(tmp_path):
    config = settings(tmp_path, lora=LoraConfig(dropout=0.1))
    config.data.train = "rows.jsonl"
    with pytest.raises(ConfigError, match=r"train\.lora\.dropout is 0\.1: it must be 0, since rollouts"):
        config.validate()
    config.train.lora = LoraConfig(targets=[])
    with pytest.raises(ConfigError, match=r"train\.lora\.targets is \[\]"):
        config.validate()
    config.train.lora, config.save.merge = None, True
    with pytest.raises(ConfigError, match=r"save\.merge is true, and without train\.lora"):
        config.validate()


def test_a_target_named_alone(tiny_llama):
    model = adapted(tiny_llama, targets="q_proj")
    assert lora.describe(model).endswith("LoRA of rank 4 on 2 layers (q_proj)")
    trained, total = 2 * 4 * (32 + 32), sum(p.numel() for p in model.parameters())
    assert lora.describe(model).startswith(f"trainable parameters: {trained:,} of {total:,} ({trained / total:.2%})")


def test_peft_is_named_where_it_is_missing(tiny_llama, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'real-fast\[peft\]'"):
        adapted(tiny_llama)


def settings(model, **train):
    return Config(model=str(model), output="out", train=TrainConfig(device="cpu", **train))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_base_is_kept_in_what_it_is_computed_in(golden_model, precision):
    """An update is that of a base in float32, to the last bit, since autocast rounds what was rounded before."""
    torch.manual_seed(0)
    policy = load_policy(settings(golden_model, precision=precision, lora=LoraConfig(r=4)), None)
    dtypes = {name: p.dtype for name, p in policy.model.named_parameters()}
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    assert dtypes["model.layers.0.mlp.up_proj.base_layer.weight"] == half
    assert {dtypes[name] for name in dtypes if "lora_" in name or "norm" in name} == {torch.float32}
    assert dtypes["model.embed_tokens.weight"] == dtypes["lm_head.weight"] == torch.float32
    whole = Policy(load_model(str(golden_model), CPU, torch.float32), policy.autocast_dtype, "sdpa")
    lora.add_adapters(whole.model, LoraConfig(r=4), "base")
    own = dict(whole.model.named_parameters())
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.05
            own[name].data.copy_(parameter)
    groups = make_groups()
    for group in groups:  # golden_model has 259 tokens
        group.prompt_ids = [i % 256 for i in group.prompt_ids]
        for rollout in group.rollouts:
            rollout.sampled_ids = [i % 256 for i in rollout.sampled_ids]
            rollout.context_ids = [i % 256 for i in rollout.context_ids]
    assert update(policy.train(), groups) == update(whole.train(), groups)
    assert all(torch.equal(p.grad, own[n].grad) for n, p in policy.model.named_parameters() if p.requires_grad)


FLAGS = ("--train.lora.r", "4", "--optim.lr", "1e-2", "--objective.kl_every", "1", "--save.every", "1")


@pytest.fixture(scope="module")
def whole(golden_model, tmp_path_factory):
    """A run that trains adapters, with a warm-up: four updates."""
    output = tmp_path_factory.mktemp("lora") / "run"
    assert main(run_flags(golden_model, output, *FLAGS, "--train.steps", "4", "--save.keep", "9")) == 0
    return output


@pytest.mark.e2e
def test_a_run_trains_adapters_alone(whole, golden_model):
    final = whole / "final"
    names = {path.name for path in final.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "real_fast.json"} <= names
    assert not (names & {"model.safetensors", "config.json"})
    config = json.loads((final / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == str(golden_model.resolve())
    steps = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert steps == [f"step-{n:06d}" for n in range(5)]
    for step in steps:
        files = {path.name for path in (whole / "checkpoints" / step).iterdir()}
        assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    start, end = (load_file(whole / "checkpoints" / s / "adapter_model.safetensors") for s in (steps[0], steps[-1]))
    assert all(not torch.equal(start[name], end[name]) for name in start)
    lines = [m for m in metric_lines(whole) if m["phase"] == "real"]
    assert lines[0]["kl"] == 0 and lines[-1]["kl"] > 0  # to the policy behind the warm-up


@pytest.mark.e2e
def test_resumed_it_is_the_same_to_the_last_bit(whole, golden_model, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    for path in ("final", "checkpoints/step-000003", "checkpoints/step-000004"):
        shutil.rmtree(output / path)
    (output / "summary.json").unlink()
    again = run_flags(golden_model, output, *FLAGS, "--train.steps", "4", "--save.keep", "9", "--resume")
    assert main([*again, "--train.lora.alpha", "8"]) == 2
    assert "train.lora.alpha = 8.0, which was 32.0" in capsys.readouterr().err
    assert main([*again, "--train.lora", "null"]) == 2
    assert "train.lora = None, which was True" in capsys.readouterr().err
    assert main(again) == 0
    a, b = (load_file(run / "final" / "adapter_model.safetensors") for run in (whole, output))
    assert all(torch.equal(a[name], b[name]) for name in a) and metric_lines(whole) == metric_lines(output)


@pytest.mark.e2e
def test_evaluate_loads_the_adapters(whole, tmp_path):
    """It predicts what the run predicted at its end, of the same feedback."""
    from real_fast.evaluate import main as evaluate

    flags = ["--data", "synthetic:eval", "--output", str(tmp_path / "eval"), "--rollout.engine", "transformers"]
    flags += ["--precision", "fp32", "--max_rows", "4", "--bootstrap", "10"]
    assert evaluate(["--model", str(whole / "final"), *flags]) == 0
    ours, theirs = (list(read_jsonl(path / "predictions.jsonl")) for path in (tmp_path / "eval", whole))
    assert [line["feedback"] for line in ours] == [line["feedback"] for line in theirs] and len(ours) == 4
    assert [line["prediction"] for line in ours] == pytest.approx([line["prediction"] for line in theirs], abs=1e-5)


@pytest.mark.e2e
def test_a_chain_of_adapters_and_whole_models(whole, golden_model, tmp_path, capsys):
    """Adapters go on as adapters, a whole model goes on from both, and merged ones are what the adapters compute."""
    few = ("--train.steps", "1", "--warmup.steps", "0")
    few += ("--save.keep", "9", "--save.merge", "--init_from", str(whole))
    second = run_flags(golden_model, tmp_path / "second", *FLAGS, *few)
    assert main([*second, "--train.lora.r", "8"]) == 2
    assert "r is 4 there and 8 here" in capsys.readouterr().err and not (tmp_path / "second" / "final").exists()
    assert main(second) == 0
    steps = (whole / "checkpoints" / "step-000004", tmp_path / "second" / "checkpoints" / "step-000000")
    a, b = (load_file(step / "adapter_model.safetensors") for step in steps)
    assert all(torch.equal(a[name], b[name]) for name in a)
    final = tmp_path / "second" / "final"
    assert {"model.safetensors", "config.json", "real_fast.json"} <= {path.name for path in final.iterdir()}
    ids = load_tokenizer(str(final))("The response follows the rubric.", return_tensors="pt")["input_ids"]
    of_adapters = load_model(str(tmp_path / "second" / "adapter"), CPU, torch.float32)
    want = of_adapters(ids).logits
    torch.testing.assert_close(load_model(str(final), CPU, torch.float32)(ids).logits, want, rtol=1e-4, atol=1e-4)
    # All weights are trained on from the merged ones.
    full = replace(settings(golden_model, precision="fp32"), init_from=str(tmp_path / "second" / "adapter"))
    policy = load_policy(full, None)
    assert not lora.is_adapted(policy.model) and all(p.requires_grad for p in policy.parameters())
    torch.testing.assert_close(policy.model(ids).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.e2e
def test_a_whole_model_then_adapters_then_a_whole_model(golden_model, tmp_path):
    """Runs chained by init_from: each starts at the weights that the one before ended with."""
    few = ("--train.steps", "2", "--warmup.steps", "0", "--optim.lr", "1e-2", "--save.every", "1", "--save.keep", "9")
    start = golden_model
    ids = torch.arange(4, 30)[None]
    ends = []
    for name, more in (("full", ()), ("adapters", ("--train.lora.r", "4")), ("again", ())):
        run = tmp_path / name
        assert main(run_flags(golden_model, run, *few, *more, "--init_from", str(start))) == 0
        begin, end = (
            load_model(str(f), CPU, torch.float32) for f in (run / "checkpoints" / "step-000000", run / "final")
        )
        if ends:
            torch.testing.assert_close(begin(ids).logits, ends[-1](ids).logits, rtol=1e-4, atol=1e-4)
        assert (end(ids).logits - begin(ids).logits).abs().max() > 1e-3
        assert lora.is_adapted(end) == (name == "adapters")
        ends, start = [*ends, end], run
    config = json.loads((tmp_path / "adapters" / "final" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((tmp_path / "full" / "final").resolve())


def test_folders_that_hold_no_usable_adapter(tiny_llama, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    lora.save_adapters(adapted(tiny_llama, base=str(tmp_path / "gone")), folder)
    with pytest.raises(ModelError, match=r"adapter of the model .*gone.*does not exist.*base_model_name_or_path"):
        load_model(str(folder), CPU, torch.float32)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors: adapter_model\.bin is pickled"):
        load_model(str(folder), CPU, torch.float32)
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, said in (
        ({"peft_type": "IA3"}, "of the kind IA3"),
        ({"modules_to_save": ["lm_head"]}, "whole copies of"),
        ({"base_model_name_or_path": None}, "does not name its model"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match=said):
            load_model(str(folder), CPU, torch.float32)
