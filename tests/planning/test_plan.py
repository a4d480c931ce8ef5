"""Operations and memory from the config alone, against what a real model does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config

from real_fast.attention.interface import prepare, prepared_mask
from real_fast.attention.layout import Layout
from real_fast.attention.support import enable
from real_fast.config import Config, LoraConfig, OptimConfig, TrainConfig
from real_fast.config.commands import PlanConfig
from real_fast.model.liger import LigerLayers
from real_fast.model.lora import add_adapters
from real_fast.model.policy import Policy
from real_fast.model.ref_policy import frozen_copy
from real_fast.plan import main
from real_fast.planning import memory
from real_fast.planning.changes import changed_flags, smallest_change
from real_fast.planning.flops import ModelFlops
from real_fast.planning.memory import ModelSizes, Training, largest, update_memory
from real_fast.planning.need import need
from real_fast.planning.shape import known_models, shape_of
from real_fast.training.optim import build_optimizer
from real_fast.training.setup import load_policy
from real_fast.types import Group, Rollout
from real_kernels import head

GROUPS = ((40, (12, 30)), (25, (18,)))


def run_packed(model, layout):
    return model.base_model(
        input_ids=torch.arange(layout.tokens)[None] % 300,
        position_ids=layout.position_ids()[None],
        attention_mask=prepared_mask(torch.device("cpu")),
        shared_prompt=prepare(layout, "sdpa", torch.device("cpu")),
        use_cache=False,
    ).last_hidden_state


def group(p, lengths):
    rollouts = [Rollout([5] * (r - 1), [0.0] * (r - 1), [5] * r, 1, "phrase", None, None) for r in lengths]
    return Group(0, [5] * p, 1.0, rollouts)


def test_operations_of_the_body(tiny_llama):
    """Matrix products as PyTorch counts them; attention by the pairs that the mask lets through."""
    model = tiny_llama(layers=3)
    enable(model, "sdpa")
    layout = Layout.of_groups(GROUPS)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run_packed(model, layout)
    matmuls = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    flops = ModelFlops.of(model.config)
    assert matmuls == 2 * flops.body * layout.tokens
    spans = [(length, before) for _, length, _, before in layout.segments.tolist()]
    pairs = int(layout.mask().sum())
    heads, size, layers = 4, 8, 3
    assert flops.forward(spans) == matmuls + 4 * heads * size * layers * pairs


def test_operations_of_a_window(tiny_llama):
    flops = ModelFlops(body=0, attention=1, head=0, window=5)
    layout = Layout.of_groups(GROUPS)
    spans = [(length, before) for _, length, _, before in layout.segments.tolist()]
    assert flops.forward(spans) == 4 * int(layout.mask(5).sum())


def test_the_design_pages_example():
    """P 1200, R 250, K 8 on an 8B body with a 152k vocabulary: 4.6 times less work with recomputation, 6.2 without."""
    config = Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, tie_word_embeddings=False,
    )  # fmt: skip
    flops = ModelFlops.of(config)
    one = [group(1200, [250] * 8)]
    both_recompute = flops.update(one, recompute=True).ratio
    freed = flops.update(one, recompute=True).reference / flops.update(one).ours
    assert both_recompute == pytest.approx(4.6, abs=0.15)
    assert freed == pytest.approx(6.2, abs=0.3)
    assert flops.update(one, shared_prompt=False).ratio < 2


def kept_bytes(model, tokens, autocast):
    """What autograd really keeps of a forward pass, weights and their copies included."""
    seen, alive = {}, []

    def pack(x):
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        alive.append(x)
        return x

    layout = Layout.of_groups([(tokens, ())])
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        run_packed(model, layout).sum()
    return sum(seen.values())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_activations_are_counted_exactly(tiny_llama, precision):
    model = tiny_llama(layers=4).train()
    enable(model, "sdpa")
    sizes = ModelSizes.of(model.config)
    real = kept_bytes(model, 192, precision == "bf16") - kept_bytes(model, 64, precision == "bf16")
    kept = sizes.kept[precision]
    assert 128 * (4 * kept.layer + kept.other) == pytest.approx(real, rel=0.01)
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert sizes.layer == sum(p.numel() for p in model.base_model.layers[0].parameters())
    assert not sizes.tied and sizes.head == model.lm_head.weight.numel()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_activations_with_adapters_are_counted_exactly(tiny_llama, precision):
    """At a rank that the count has not seen, and its parameters too."""
    model = tiny_llama(layers=4)
    sizes, training = ModelSizes.of(model.config), Training(precision=precision, rank=3)
    add_adapters(model, LoraConfig(r=3), "")
    enable(model.train(), "sdpa")
    real = kept_bytes(model, 192, precision == "bf16") - kept_bytes(model, 64, precision == "bf16")
    kept = sizes.kept[training.mode]
    assert 128 * (4 * (kept.layer + 3 * kept.rank) + kept.other) == pytest.approx(real, rel=0.01)
    assert training.adapters(sizes) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_adapters_of_some_layers_alone(tiny_llama):
    model = tiny_llama()
    sizes = ModelSizes.of(model.config)
    add_adapters(model, LoraConfig(r=2, targets=["q_proj", "down_proj"]), "")
    training = Training(rank=2, targets=("q_proj", "down_proj"))
    assert training.adapters(sizes) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_boundaries_are_as_wide_as_the_weights_that_make_them(tiny_llama):
    """The residual stream is in the embedding's dtype: in half precision where the weights are."""
    sizes = ModelSizes.of(tiny_llama().config)
    assert sizes.kept["bf16"].boundary == sizes.kept["fp32"].boundary == 4 * sizes.hidden
    assert sizes.kept["bf16 weights"].boundary == 2 * sizes.hidden
    full, half = (
        update_memory(sizes, 100, Training(weights=weights), head_rows=50, checkpointing=True)
        for weights in ("fp32", "bf16")
    )
    assert half.weights == full.weights / 2 and half.moments == full.moments / 2 and half.copies == 0
    assert half.activations < full.activations


WAYS = {
    "fp32": (Training("fp32", device="cpu"), {"precision": "fp32"}, {}),
    "bf16": (Training("bf16", device="cpu"), {"precision": "bf16"}, {}),
    "adapters": (Training("bf16", rank=2, device="cpu"), {"precision": "bf16", "lora": LoraConfig(r=2)}, {}),
    "adapters, fp32": (Training("fp32", rank=2, device="cpu"), {"precision": "fp32", "lora": LoraConfig(r=2)}, {}),
    "nf4": (
        Training("bf16", rank=2, nf4=True, device="cpu"),
        {"precision": "bf16", "lora": LoraConfig(r=2), "quantization": "nf4"},
        {},
    ),
    "8 bits": (Training("fp32", optimizer="adamw8bit", device="cpu"), {"precision": "fp32"}, {"name": "adamw8bit"}),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_weights_gradients_and_moments_are_those_of_a_run(tmp_path, tiny_llama, way, tied):
    """The bytes of the tensors that a run of each kind really has, behind a step."""
    training, train, optim = WAYS[way]
    model = tiny_llama(tied=tied, hidden_size=128)
    model.save_pretrained(tmp_path)
    config = Config(model=str(tmp_path), train=TrainConfig(device="cpu", **train), optim=OptimConfig(**optim))
    policy = load_policy(config, None)
    optimizer = build_optimizer(policy.model, config.optim)
    for p in policy.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    plan = update_memory(ModelSizes.of(model.config), 64, training, head_rows=32)
    weights = {p.data_ptr(): p.nbytes + quantized_bytes(p) for p in policy.parameters()}
    assert plan.weights == pytest.approx(sum(weights.values()), rel=0.02)
    assert plan.gradients == sum(p.grad.nbytes for p in policy.parameters() if p.grad is not None)
    moments = sum(bytes_of(v) for state in optimizer.state.values() for k, v in state.items() if k != "step")
    assert plan.moments == pytest.approx(moments, rel=0.02)


def quantized_bytes(parameter):
    """Of the scales of a weight in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return 0
    nested = getattr(state, "state2", None)  # gone on a CPU that packed them anew, with scales in bf16
    return state.absmax.nbytes + (nested.absmax.nbytes if nested is not None else 0)


def bytes_of(tensor):
    """Of torchao's, which is made of two, too."""
    parts = [getattr(tensor, name) for name in ("codes", "scale") if hasattr(tensor, name)]
    return sum(part.nbytes for part in parts or [tensor])


def test_memory_by_part(tiny_llama):
    sizes = ModelSizes.of(tiny_llama(tied=True).config)
    one = update_memory(sizes, 100, head_rows=50)
    assert (one.weights, one.gradients, one.moments) == tuple(n * sizes.parameters for n in (4, 4, 8))
    sharded = update_memory(sizes, 100, head_rows=50, gpus=4)
    assert sharded.weights == one.weights / 4 and sharded.activations == one.activations
    assert one.step == 0 and one.total == 16 * sizes.parameters + one.copies + one.activations + one.head
    recomputed = update_memory(sizes, 100, head_rows=50, checkpointing=True)
    assert recomputed.activations < one.activations
    more = update_memory(sizes, 100, head_rows=50, repeated_keys=100)
    assert more.activations - one.activations == 2 * sizes.layers * sizes.kv_width * 100


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_memory_of_the_reference(tiny_llama, tied, precision):
    """Against a real copy; on a CPU an untied head is kept in float32, and the plan is for a GPU."""
    model = tiny_llama(tied=tied)
    sizes, training = ModelSizes.of(model.config), Training(precision=precision)
    one, held = (update_memory(sizes, 100, training, head_rows=50, kl=kl) for kl in (False, True))
    assert one.reference == 0 and held.total - one.total == held.reference
    policy = Policy(model, torch.bfloat16 if precision == "bf16" else None)
    copy = frozen_copy(policy, torch.device("cpu"))
    real = sum(p.numel() * p.element_size() for p in copy.parameters())
    if precision == "bf16" and not tied:
        real -= 2 * sizes.head
    assert held.reference == pytest.approx(real, rel=0.01)


def test_work_of_the_kl_and_of_iterations(tiny_llama):
    flops, groups = ModelFlops.of(tiny_llama().config), [group(40, [12, 30])]
    one, kl = flops.update(groups), flops.update(groups, kl=True)
    forward, head = flops.forward([(40, 0), (12, 40), (30, 40)]), 2 * flops.head * (11 + 29 + 2)
    assert one.ours == 3 * forward + 3 * head
    assert kl.ours == 4 * forward + 5 * head  # the reference's forward pass, and logits computed again
    assert flops.update(groups, iterations=3).ours == 9 * forward + 12 * head
    assert flops.update(groups, kl=True, iterations=3).ours == 10 * forward + 13 * head
    assert kl.reference - one.reference == pytest.approx(one.reference / 4)  # one more of four equal passes


def test_largest():
    assert largest(lambda n: n <= 37) == 37
    assert largest(lambda n: False) == 0
    assert largest(lambda n: True, limit=9) == 9


@pytest.fixture
def model_folder(tmp_path, tiny_llama):
    tiny_llama().config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_command_says_what_fits(model_folder, capsys):
    given = ["--model", model_folder, "--gpus", "8", "--gpu-memory", "80", "--prompt-tokens=1200"]
    assert main(given) == 0
    text = capsys.readouterr().out
    assert "8 x 80 GiB" in text and "prompts of 1200 tokens" in text and "times less" in text and "up to " in text
    last = text.splitlines()[-1]
    assert last.startswith("FITS: ") and "on several GPUs nothing has been measured" in last


def test_the_command_says_what_does_not_fit(model_folder, capsys):
    assert main(["--model", model_folder, "--gpu-memory", "0.1"]) == 1
    text = capsys.readouterr().out
    last = text.splitlines()[-1]
    assert last.startswith("DOES NOT FIT") and "The smallest device that fits: " in last and "nothing" in text


def test_the_command_takes_a_training_config(model_folder, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("rollout: {group_size: 5, max_tokens: 94}\nprompt: {max_tokens: 300}\n", encoding="utf-8")
    assert main(["--config", str(config), "--model", model_folder]) == 0
    text = capsys.readouterr().out
    assert "32 prompts x 5 rollouts, prompts of 300 tokens, responses of 100" in text and "reference for" not in text
    assert main(["--config", str(config), "--model", model_folder, "--objective.kl_coef", "0.1"]) == 0
    assert "reference for the KL, frozen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "model is not set"),
        (["--model", "/nowhere/at/all"], "config of model /nowhere/at/all"),
        (["--model", "MODEL", "--gpus", "0"], "gpus is 0"),
        (["--model", "MODEL", "--method", "reel"], "did you mean real"),
        (["--model", "Qwen/Qwen3-9B"], "did you mean Qwen/Qwen3-8B"),
    ],
)
def test_mistakes(model_folder, capsys, flags, message):
    assert main([model_folder if f == "MODEL" else f for f in flags]) == 2
    assert message in capsys.readouterr().err


def test_a_config_without_weights_is_enough(tmp_path, capsys):
    """A 32B model's numbers, from a few hundred bytes."""
    config = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 5120, "num_hidden_layers": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 25600,
        "vocab_size": 151936, "tie_word_embeddings": False, "max_position_embeddings": 40960,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["--model", str(tmp_path), "--gpus", "8", "--gpu-memory", "80"]) == 1
    assert "32.76 B parameters in 64 layers, untied head (0.78 B)" in capsys.readouterr().out


def test_the_constants_are_those_of_the_head():
    assert (memory.CHUNK_BYTES, memory.TRITON_CHUNK_BYTES) == (head.CHUNK_BYTES, head.TRITON_CHUNK_BYTES)


def test_the_table_of_models_is_what_is_counted(tmp_path):
    """Published totals, and one model counted anew; activations may move a little with Transformers' versions."""
    published = {
        "smollm2-135m": 134_515_008, "Qwen/Qwen3-0.6B": 596_049_920, "Qwen/Qwen3-1.7B": 1_720_574_976,
        "Qwen/Qwen3-4B": 4_022_468_096, "Qwen/Qwen3-8B": 8_190_735_360, "Qwen/Qwen3-14B": 14_768_307_200,
        "Qwen/Qwen3-32B": 32_762_123_264, "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    }  # fmt: skip
    table = known_models()
    assert {name: found["sizes"]["parameters"] for name, found in table.items()} == published
    (tmp_path / "config.json").write_text(json.dumps(table["Qwen/Qwen3-0.6B"]["config"]), encoding="utf-8")
    kept, counted = shape_of("Qwen/Qwen3-0.6B"), shape_of(str(tmp_path))
    assert kept.flops == counted.flops and kept.sizes.kept.keys() == counted.sizes.kept.keys()
    for mode, activations in kept.sizes.kept.items():
        assert vars(activations) == pytest.approx(vars(counted.sizes.kept[mode]), rel=0.05)
    assert replace(kept.sizes, kept={}) == replace(counted.sizes, kept={})
    assert "published dimensions" in kept.source and counted.source == str(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["qwen3-8b-real", "qwen3-32b-real", "mistral-7b-real", "quickstart"])
def test_a_plan_needs_neither_network_nor_pytorch(name):
    code = (
        f"import sys; from real_fast.commands import main; status = main(['plan', '--config', {name!r}])\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules, status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *report, last = done.stdout.strip().splitlines()
    assert last == f"False False {0 if name == 'quickstart' else 1}", done.stderr
    assert report[-1].startswith(("FITS: ", "DOES NOT FIT"))


def plan_of(name, gpu_memory=80.0, **sections):
    config = PlanConfig(model=name, gpu_memory=gpu_memory)
    for section, changes in sections.items():
        setattr(config, section, replace(getattr(config, section), **changes))
    return config


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        (plan_of("Qwen/Qwen3-0.6B", rollout={"gpu_memory_utilization": 0.9}), "--rollout.gpu_memory_utilization"),
        (plan_of("Qwen/Qwen3-0.6B", train={"micro_batch_tokens": 10**6}), "--train.micro_batch_tokens"),
        (plan_of("Qwen/Qwen3-1.7B", rollout={"max_tokens": 1500}), "--train.activation_checkpointing"),
        (
            plan_of("Qwen/Qwen3-0.6B", 20.0, rollout={"engine": "transformers", "max_num_seqs": 512}),
            "--rollout.max_num_seqs --train.activation_checkpointing",
        ),
        (
            plan_of("Qwen/Qwen3-1.7B", 57.0, rollout={"sleep": "never"}, train={"micro_batch_tokens": 6400}),
            "--rollout.sleep",
        ),
        (plan_of("Qwen/Qwen3-1.7B", 30.0), "--optim.offload --train.activation_checkpointing"),
        (
            plan_of("Qwen/Qwen3-8B", 24.0),
            "--train.quantization --train.micro_batch_tokens --train.activation_checkpointing --train.lora.r",
        ),
    ],
)
def test_the_smallest_change_is_the_smallest(config, flags):
    """It names as few settings as can be, each changed no further than it must be, and it fits."""
    sizes = shape_of(config.model).sizes
    changed = smallest_change(config, sizes, kl=False)
    found = changed_flags(config, changed)
    assert " ".join(re.findall(r"--[\w.]+", found)) == flags, found
    assert not need(config, sizes, kl=False).fits and need(changed, sizes, kl=False).fits
    if flags == "--rollout.gpu_memory_utilization":
        share = round(changed.rollout.gpu_memory_utilization + 0.01, 2)
        assert not need(
            replace(config, rollout=replace(changed.rollout, gpu_memory_utilization=share)), sizes, False
        ).fits
    if flags == "--train.micro_batch_tokens":
        longer = replace(changed.train, micro_batch_tokens=changed.train.micro_batch_tokens + 256)
        assert not need(replace(config, train=longer), sizes, kl=False).fits


def test_nothing_that_fits_is_said_with_the_device_that_would_do(capsys):
    assert main(["--config", "qwen3-8b-real", "--gpu_memory", "10"]) == 1
    text = capsys.readouterr().out
    last = text.splitlines()[-1]
    assert "weights, gradients and moments alone take 122.1 GiB" in last
    gib = re.search(r"smallest device that fits: (\d+) GiB with (.*)", last)
    assert main(["--config", "qwen3-8b-real", "--gpu_memory", gib[1], *gib[2].split()]) == 0
    assert main(["--config", "qwen3-8b-real", "--gpu_memory", str(int(gib[1]) - 1), *gib[2].split()]) == 1
    assert "published dimensions" in text


def test_a_micro_batch_below_one_group_does_not_fit(capsys):
    assert main(["--model", "Qwen/Qwen3-0.6B", "--train.micro_batch_tokens", "1000"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert "one group takes 6192 tokens, and train.micro_batch_tokens is 1000" in last


def test_weights_in_bf16_count_as_such_whatever_the_products(capsys):
    """Training refuses it; the plan has no traceback for it."""
    flags = ["--gpu_memory", "80", "--train.weights", "bf16", "--train.precision", "fp32"]
    assert main(["--model", "Qwen/Qwen3-0.6B", *flags]) == 0
    assert Training(precision="fp32", weights="bf16").mode == "bf16 weights"


def test_liger_keeps_what_is_counted_for_it(tiny_llama, interpreted_liger):
    """Bytes a token that wait for the backward pass, in fp32: the interpreter knows no bf16."""
    model = tiny_llama(layers=2)
    layers = LigerLayers(model)

    def kept(tokens):
        seen, alive = {}, []
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(x):
            alive.append(x)
            if x.untyped_storage().data_ptr() not in known:
                seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        layers.on()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.train().model(input_ids=torch.zeros(1, tokens, dtype=torch.int64), use_cache=False)
        layers.off()
        return sum(seen.values())

    sizes = ModelSizes.of(model.config)
    own, counted = sizes.kept["fp32"], sizes.kept["fp32 liger"]
    found = (kept(32) - kept(16)) / 16
    assert found == pytest.approx(2 * counted.layer + counted.other, rel=0.02)
    assert counted.layer < 0.8 * own.layer
    assert sizes.kept[Training(precision="fp32", rank=4, liger=True).mode].layer < sizes.kept["fp32 adapters"].layer
