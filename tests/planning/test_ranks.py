"""A run on many GPUs, against the same things done one by one: units gathered, rings walked, groups dealt out."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import replace

import pytest

from real_fast.batching.micro_batches import balanced_bins, deal
from real_fast.config import Config, LoraConfig
from real_fast.config.commands import PlanConfig
from real_fast.errors import ConfigError
from real_fast.plan import main
from real_fast.planning.cards import BANDWIDTH, COMPUTE, HOP, LINKS, OVERLAP, PER_TOKEN, card_of
from real_fast.planning.fit import Sequences, check_fits
from real_fast.planning.flops import UpdateFlops
from real_fast.planning.links import Links
from real_fast.planning.memory import Training, update_memory
from real_fast.planning.need import CHANNELS, ENGINE_WORK, GIB, RESERVE, need
from real_fast.planning.plan import make_plan, settled
from real_fast.planning.ranks import Ranks
from real_fast.planning.seconds import seconds
from real_fast.planning.shape import shape_of

MODEL = "Qwen/Qwen3-8B"
H100 = card_of("h100")


def config_of(model=MODEL, gpus=8, **settings):
    config = PlanConfig(model=model, gpu_memory=80.0, gpus=gpus)
    for name, value in settings.items():
        section, _, key = name.rpartition("__")
        owner = getattr(config, section) if section else config
        setattr(owner, key, value)
    return config


def units_of(sizes):
    """Numbers of parameters: the embedding, each layer, and the rest, which belongs to the root."""
    layers, embedding = [sizes.layer] * sizes.layers, 0 if sizes.tied else sizes.head
    return embedding, layers, sizes.parameters - embedding - sum(layers)


def walk(sizes, width, boundary, layer_kept):
    """Bytes at each moment of a forward and backward pass with checkpointing, as FSDP2 orders gathering and freeing.

    Args:
        sizes: The model's.
        width: Bytes of a gathered number.
        boundary: Bytes of a layer's input.
        layer_kept: Bytes of all that one layer keeps.
    """
    embedding, layers, root = units_of(sizes)
    moments = [width * (root + embedding + layers[0])]
    for i, layer in enumerate(layers):
        ahead = layers[i + 1] if i + 1 < len(layers) else 0
        moments.append(width * (root + layer + ahead) + (i + 1) * boundary)
    for i, layer in reversed(list(enumerate(layers))):
        ahead = layers[i - 1] if i else embedding
        # The root's gradient is whole until the end; the layer's is copied into float32 to be sent.
        whole = width * (root + layer + ahead) + width * root + (width + 4) * layer
        moments.append(whole + (i + 1) * boundary + layer_kept)
    moments.append(width * (root + embedding) + width * root + (width + 4) * embedding)
    moments.append(width * root + (width + 4) * root)
    return moments


@pytest.mark.parametrize("model", ["Qwen/Qwen3-0.6B", MODEL, "Qwen/Qwen3-32B", "mistralai/Mistral-7B-Instruct-v0.2"])
def test_what_is_whole_at_a_time(model):
    """The plan is above every moment, by no more than an embedding and what the head's own moment takes."""
    sizes, tokens = shape_of(model).sizes, 8192
    m = update_memory(sizes, tokens, Training(), head_rows=tokens // 2, checkpointing=True, gpus=4)
    kept = sizes.kept["bf16"]
    highest = max(walk(sizes, 2.0, tokens * kept.boundary, tokens * kept.layer)) + tokens * kept.other
    found = m.copies + m.summed + m.activations
    assert highest * 0.999 <= found <= highest + (2 + 4 + 2) * sizes.head


def test_each_rank_holds_its_part():
    sizes = shape_of(MODEL).sizes
    one = update_memory(sizes, 64, head_rows=32)
    for gpus, replicas in ((2, 1), (6, 2), (6, 3)):
        m = update_memory(sizes, 64, head_rows=32, gpus=gpus, replicas=replicas)
        parts = gpus // replicas
        for name in ("weights", "gradients", "moments"):
            assert getattr(m, name) == getattr(one, name) / parts
    kept = sizes.kept["bf16"]  # gathered in 16 bits, and what goes from layer to layer in float32, as on one GPU
    assert m.activations == 64 * (sizes.layers * kept.layer + kept.other)
    eight = update_memory(sizes, 64, Training(optimizer="adamw8bit"), head_rows=32, gpus=4)
    assert eight.moments == pytest.approx(2.03 * sizes.parameters / 4, rel=0.01)


@pytest.mark.parametrize(
    ("model", "gpus", "tokens", "gigabytes"),
    [(MODEL, 8, 24576, 38), ("Qwen/Qwen3-32B", 16, 24576, 72), ("Qwen/Qwen3-32B", 16, 8192, 54)],
)
def test_the_trainers_gigabytes_as_first_reckoned(model, gpus, tokens, gigabytes):
    """By hand, with what goes from layer to layer in 16 bits; the 2 GiB of the context may be in those numbers."""
    sizes = shape_of(model).sizes
    m = update_memory(sizes, tokens, head_rows=tokens, checkpointing=True, gpus=gpus)
    narrow, wide = sizes.kept["bf16 weights"], sizes.kept["bf16"]
    wider = sizes.layers * (wide.boundary - narrow.boundary) + wide.layer - narrow.layer + wide.other - narrow.other
    found = m.total - tokens * wider
    assert found / 1e9 <= gigabytes + 1 and (found + RESERVE) / 1e9 >= 0.96 * gigabytes


def ring(nbytes, gpus, rate):
    """Seconds of one collective, a step at a time: each GPU passes a part on, all at once."""
    took = 0.0
    for _ in range(gpus - 1):
        took += nbytes / gpus / rate + HOP
    return took


@pytest.mark.parametrize("model", ["Qwen/Qwen3-0.6B", MODEL])
@pytest.mark.parametrize(("gpus", "replicas"), [(4, 1), (16, 1), (16, 2), (16, 4)])
def test_messages_of_a_micro_batch(model, gpus, replicas):
    """Unit by unit: gathered for both passes (the root's weights once), summed, and added up over replicas."""
    sizes = shape_of(model).sizes
    (embedding, layers, root), shards = units_of(sizes), gpus // replicas
    ranks = Ranks(gpus, 8, replicas, 1, gpus, False)
    within = LINKS * (450e9 if shards <= 8 else min(450e9, 8 * 50e9))
    across = LINKS * (450e9 if gpus <= 8 else 50e9)
    took = 0.0
    for unit, times in [(root, 1), *((n, 2) for n in layers), *([(embedding, 2)] if embedding else [])]:
        took += times * ring(2.0 * unit, shards, within)
        took += ring(4.0 * unit, shards, within)
        took += 2 * ring(4.0 * unit / shards, replicas, across)
    found = Links.of(H100, ranks, 0.0).micro_batch(sizes, Training(), kl=False)
    assert found == pytest.approx(took, rel=1e-3)


def test_bytes_and_not_hops_decide_at_real_sizes():
    """8.19 B parameters: 16 bits twice but for the head, and 32 bits of gradients, seven eighths of which are sent."""
    sizes, links = shape_of(MODEL).sizes, Links.of(H100, Ranks(8, 8, 1, 1, 8, False), 0.0)
    sent = 7 / 8 * (2 * (2 * 8.191e9 - 0.622e9) + 4 * 8.191e9)
    assert links.micro_batch(sizes, Training(), False) == pytest.approx(sent / (0.7 * 450e9), rel=0.03)
    adapters = links.micro_batch(sizes, Training(rank=16), False)
    assert adapters < 0.55 * links.micro_batch(sizes, Training(), False) < links.micro_batch(sizes, Training(), True)
    slow = Links.of(H100, Ranks(16, 8, 1, 1, 16, False), 10.0).micro_batch(sizes, Training(), False)
    assert slow == pytest.approx(sent * (15 / 16) / (7 / 8) / (0.7 * 8 * 10e9 / 8), rel=0.03)


@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
@pytest.mark.parametrize("prompts", [1, 5, 16, 31])
def test_the_busiest_rank(gpus, prompts):
    """As the trainer deals groups of equal length out: as many micro-batches on every rank."""
    group, budget = 100, 250
    bins = balanced_bins([group] * prompts, budget, gpus)
    loads = [group * len(part) for part in bins]
    of_rank = [[bins[i] for i in deal(loads, rank, gpus)] for rank in range(gpus)]
    ranks = Ranks(gpus, 8, 1, 1, gpus, False)
    assert max(sum(map(len, mine)) for mine in of_rank) == ranks.of_rank(prompts)
    assert {len(mine) for mine in of_rank} == {math.ceil(ranks.of_rank(prompts) / (budget // group))}


def test_seconds_by_hand():
    """Qwen3-8B on 16 GPUs: 16 prompts a rank, two a micro-batch."""
    config = config_of(gpus=16, rollout__prompts_per_step=250, train__activation_checkpointing=True)
    config.rollout.max_num_seqs = 64
    sizes, ranks = shape_of(MODEL).sizes, Ranks.of(config)
    found = need(config, sizes, False)
    s = seconds(config, sizes, found, UpdateFlops(1e17, 0.0), H100, True)
    assert s.update == pytest.approx(1e17 * 16 / 250 / (COMPUTE * 989e12))
    group = 2048 + 8 * 518
    batches = math.ceil(16 / (24576 // group))
    sending = batches * Links.of(H100, ranks, 0.0).micro_batch(sizes, Training(), False)
    assert sending < s.update and s.waiting == pytest.approx((1 - OVERLAP) * sending)
    read = 2 * sizes.parameters + 64 * (2048 + 259) * 2 * 36 * 2048
    step = read / (BANDWIDTH * 3.35e12) + 64 * PER_TOKEN
    prefill = 2 * sizes.parameters * 2048 * 16 / (COMPUTE * 989e12)
    assert s.rollouts == pytest.approx(16 * 8 / 64 * 518 * step + prefill, rel=0.01)
    assert s.total == pytest.approx(s.update + s.waiting + s.rollouts + s.sync)
    tensors = 36 * 12
    assert s.sync == pytest.approx(15 / 16 * 2 * sizes.parameters / (LINKS * 400e9) + tensors * 15 * HOP)
    slow = seconds(replace(config, network=1.0), sizes, found, UpdateFlops(1e17, 0.0), H100, True)
    assert slow.waiting > slow.update  # what does not fit beside the computing is waited for


def test_an_engine_on_every_rank_has_the_whole_model():
    """And one over several a part of it, with as many fewer engines, of more prompts each."""
    config, sizes = config_of("Qwen/Qwen3-32B", 16, rollout__prompts_per_step=256), shape_of("Qwen/Qwen3-32B").sizes
    alone = need(config, sizes, False)
    assert alone.sequences == 0  # 66 GB of weights beside the trainer
    config.rollout.tensor_parallel = 8
    wide = need(config, sizes, False)
    per_sequence = 2 * sizes.kv_width * sizes.layers * (2048 + 518) / 8
    room = wide.share * 80 * GIB - 2 * sizes.parameters / 8 - ENGINE_WORK
    assert wide.sequences == int(room / per_sequence) > 100 and wide.reserve == RESERVE + 2 * CHANNELS
    assert Ranks.of(config).engines == 2 and Ranks.of(config).of_engine(256) == 128


def test_engines_on_gpus_of_their_own():
    """The trainer's GPUs hold no engine, the engines' no trainer; one batch ahead, the longer of the two counts."""
    sizes = shape_of(MODEL).sizes
    config = config_of(rollout__engine="vllm-server", engine_gpus=4, rollout__tensor_parallel=2)
    found, beside = need(config, sizes, False), need(config_of(), sizes, False)
    assert found.beside == 0 and found.update == beside.update - GIB
    assert found.rollouts == found.engine + found.reserve < 80 * GIB
    flops = UpdateFlops(1e17, 0.0)
    waits = seconds(config, sizes, found, flops, H100, True)
    config.rollout.ahead = 1
    ahead = seconds(config, sizes, found, flops, H100, True)
    training = waits.update + waits.waiting
    assert waits.total == pytest.approx(waits.sync + training + waits.rollouts)
    assert ahead.total == pytest.approx(ahead.sync + max(training, ahead.rollouts))
    sent = 2 * sizes.parameters / (LINKS * 50e9)
    assert waits.sync - seconds(config_of(), sizes, beside, flops, H100, True).sync == pytest.approx(sent)
    config.engine_gpus = 0
    assert Ranks.of(config).engines == 1 and Ranks.of(config).engine_gpus == 2


def test_the_smallest_change_is_one_for_several_gpus(capsys):
    """Nothing that is for one GPU is named, and what is named fits."""
    flags = ["--config", "qwen3-32b-real", "--card", "h100", "--gpus", "16"]
    assert main(flags) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    change = re.search(r"smallest change that fits: (.*?);", last)[1]
    assert change == "--rollout.tensor_parallel 8 --train.micro_batch_tokens 20480"
    assert main([*flags, *change.split()]) == 0
    text = capsys.readouterr().out
    assert "nf4" not in text and "moments  " not in text and "2 machines of 8" in text
    assert main(["--config", "qwen3-32b-real", "--gpus", "4", "--gpu_memory", "80"]) == 1
    assert "offload" not in capsys.readouterr().out.splitlines()[-1]


def test_the_same_run_on_more_gpus():
    config = settled(config_of(train__activation_checkpointing=True, rollout__prompts_per_step=256))
    plan = make_plan(config)
    found = {(p.config.gpus, p.config.train.replicas): p for p in plan.spread}
    assert list(found) == [(8, 1), (16, 1), (16, 2), (32, 1), (32, 4), (64, 1), (64, 8), (128, 1), (128, 16)]
    assert found[8, 1].efficiency == 1 and found[8, 1].seconds == plan.seconds
    for (gpus, _), point in found.items():
        per_gpu = 8 * plan.seconds.total / (gpus * point.seconds.total)
        assert point.efficiency == pytest.approx(per_gpu)
    last = [p.efficiency for p in plan.spread if p.config.train.replicas == 1][-2:]
    assert last[1] < last[0] < 1.3
    assert not make_plan(settled(config_of("Qwen/Qwen3-0.6B", gpus=1))).spread


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train__replicas": 3}, "train.replicas is 3, and 8 GPUs cannot be shared out"),
        ({"rollout__tensor_parallel": 3}, "rollout.tensor_parallel is 3, and 8 GPUs"),
        ({"gpus": 12}, "gpus_per_node is 8, and 12 GPUs"),
        ({"gpus": 16, "rollout__tensor_parallel": 16}, "an engine is not spread over several"),
    ],
)
def test_gpus_that_do_not_divide(settings, message):
    with pytest.raises(ConfigError, match=message):
        Ranks.of(config_of(**settings))


@pytest.mark.parametrize(
    "flags",
    [
        ["--optim.offload", "moments"],
        ["--train.compile"],
        ["--train.liger"],
        ["--train.lora.r", "8", "--train.quantization", "nf4"],
    ],
)
def test_what_is_for_one_gpu_is_refused(flags, capsys):
    assert main(["--model", MODEL, "--gpus", "8", *flags]) == 2
    assert "is for one GPU, and gpus is 8" in capsys.readouterr().err


def test_adapters_are_whole_on_every_rank():
    """And the weights under them in parts; their gradients are added up once an update."""
    sizes, lora = shape_of(MODEL).sizes, Training(rank=16)
    one, many = (update_memory(sizes, 64, lora, head_rows=32, gpus=gpus) for gpus in (1, 8))
    adapters = lora.adapters(sizes)
    assert many.gradients == one.gradients == 4 * adapters and many.moments == one.moments and many.summed == 0
    assert many.weights == pytest.approx(4 * adapters + (one.weights - 4 * adapters) / 8)
    links = Links.of(H100, Ranks(8, 8, 1, 1, 8, False), 0.0)
    rate = LINKS * 450e9
    more = links.update(sizes, lora, 3, False) - links.update(sizes, lora, 2, False)
    assert more == pytest.approx(links.micro_batch(sizes, lora, False))
    assert links.update(sizes, lora, 0, False) == pytest.approx(2 * ring(4 * adapters, 8, rate))
    assert links.sync(sizes, lora) == 0 < links.sync(sizes, Training())


def test_transformers_samples_with_a_model_of_its_own_on_every_rank():
    """In float32, beside the sharded one, all along."""
    sizes = shape_of("Qwen/Qwen3-1.7B").sizes
    found = need(config_of("Qwen/Qwen3-1.7B", rollout__engine="transformers"), sizes, False)
    assert found.beside == 4 * sizes.parameters and found.engine > 6 * sizes.parameters


def test_more_gpus_than_prompts_are_refused(capsys):
    assert main(["--model", MODEL, "--gpus", "64"]) == 2
    assert "rollout.prompts_per_step is 32: some GPUs would never have a prompt" in capsys.readouterr().err


def test_a_run_is_checked_for_its_ranks(caplog):
    """What one GPU cannot hold, eight can; the model is counted whole for its own engine on each."""
    config = Config(model=MODEL, output="x")
    config.train.activation_checkpointing, config.rollout.engine = True, "vllm"
    rows, room = Sequences(prompt=2048, response=1030, per_prompt=8, prompts=64), 80 * GIB
    with pytest.raises(ConfigError, match="does not fit"):
        check_fits(config, None, rows, room, room)
    with caplog.at_level(logging.WARNING):
        share = check_fits(config, None, rows, room, room, gpus=8)
    assert not caplog.text and share is not None and share * 80 * GIB > 2 * shape_of(MODEL).sizes.parameters
    config.train.lora = LoraConfig()
    assert check_fits(config, None, rows, room, room, gpus=2) is not None
