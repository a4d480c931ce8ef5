"""What ``train.compile`` and ``train.liger`` buy: measured on this machine, and by arithmetic on a GPU.

``python -m benchmarks.body`` writes results/body.json, which docs/faster-layers.md has its tables from. Measured are a
micro-batch's forward and backward pass of SmolLM2-135M, its own layers and compiled ones by turns, and what they keep.
Counted, on fake tensors, are the bytes that one layer moves outside of its matrix products and attention: what every
operator reads and writes, Liger's kernels as one operator each.
"""

from __future__ import annotations

import json
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.machine import ROOT, machine
from real_fast.batching.micro_batches import micro_batches
from real_fast.model.compiled import CompiledLayers
from real_fast.model.load import load_model
from real_fast.model.masters import WorkingWeights
from real_fast.model.policy import Policy
from real_fast.model.smollm2 import prepare
from real_fast.planning.cards import BANDWIDTH, COMPUTE, card_of
from real_fast.planning.count import keeps_as_liger, stand_in, with_layers
from real_fast.planning.flops import ModelFlops
from real_fast.planning.shape import known_models
from real_fast.types import Batch, Group, Rollout

RESULTS = ROOT / "benchmarks" / "results" / "body.json"
# Prompts of a micro-batch, rollouts of each, tokens of a prompt and of a rollout; passes by turns.
PROMPTS, K, P, R, TURNS = 2, 4, 200, 60, 7
CARD, MODELS = "h100", ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B")
# Operators whose time is not memory traffic.
_PRODUCTS = ("mm", "addmm", "bmm", "_scaled_dot_product")


def batch_of(vocabulary: int) -> Batch:
    """The micro-batch: prompts, each followed by its rollouts."""

    def ids(length: int, start: int) -> list[int]:
        return [(31 * i + start) % vocabulary for i in range(length)]

    def rollout(start: int) -> Rollout:
        text = ids(R, start)
        return Rollout(text, [-1.0] * R, text, 0, "length", None, None)

    groups = [Group(g, ids(P, g), 1.0, [rollout(7 * g + k) for k in range(K)]) for g in range(PROMPTS)]
    (batch,) = micro_batches(groups, 10**6, 0, True)
    return batch


def one_pass(policy: Policy, batch: Batch) -> float:
    """Seconds of a forward and backward pass of the body, without the head."""
    policy.zero_grad(set_to_none=True)
    start = time.perf_counter()
    with policy.working():
        policy(batch, lambda hidden, weight, batch: hidden.float().square().mean()).backward()
    return time.perf_counter() - start


def kept(policy: Policy, batch: Batch) -> int:
    """Bytes that wait for the backward pass, weights and their copies left out."""
    seen: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        alive.append(x)
        if batch.input_ids.shape[1] in x.shape or x.numel() >= batch.input_ids.shape[1]:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with policy.working():
        weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            policy(batch, lambda hidden, weight, batch: hidden.float().square().mean())
    return sum(size for place, size in seen.items() if place not in weights)


def measured(precision: str) -> dict[str, Any]:
    """Own layers and compiled ones by turns."""
    model = load_model(str(prepare()), torch.device("cpu"), torch.float32)
    model.train()
    half = torch.bfloat16 if precision == "bf16" else None
    work = None if half is None else WorkingWeights(model, torch.device("cpu"), half)
    policy = Policy(model, half, "sdpa", work)
    batch = batch_of(model.config.vocab_size)
    compiled = CompiledLayers(model)
    one_pass(policy, batch)
    policy.faster = compiled
    first = one_pass(policy, batch)
    own: list[float] = []
    faster: list[float] = []
    for _ in range(TURNS):
        policy.faster = None
        own.append(one_pass(policy, batch))
        policy.faster = compiled
        faster.append(one_pass(policy, batch))
    policy.faster = compiled
    kept_compiled = kept(policy, batch)
    policy.faster = None
    return {
        "precision": precision,
        "tokens": batch.input_ids.numel(),
        "own": statistics.median(own),
        "compiled": statistics.median(faster),
        "spread": [min(own), max(own), min(faster), max(faster)],
        "first": first,
        "kept_own": kept(policy, batch),
        "kept_compiled": kept_compiled,
    }


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write, those of matrix products and attention left out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        schema = function._schema
        name = schema.name.removeprefix("aten::")
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if not (view or name.startswith(_PRODUCTS) or "empty" in name or function.namespace != "aten"):
            tensors = [x for x in (*args, *(args[0] if args and isinstance(args[0], (list, tuple)) else ()), out)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))
        return out


def moved(config: Any, liger: bool) -> float:
    """Bytes a token and layer, forward and backward, bf16 products over float32 weights."""

    def at(layers: int, tokens: int) -> int:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(with_layers(config, layers))
        with FakeTensorMode():
            stand_in(model)
            ids, places = torch.zeros(1, tokens, dtype=torch.int64), torch.arange(tokens)[None]
            layers_of = keeps_as_liger(model) if liger else nullcontext()
            with layers_of, torch.autocast("cpu", torch.bfloat16), Traffic() as traffic:
                model.train()
                out = model.base_model(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state
                out.sum().backward()
        return int(traffic.bytes)

    two, one = (at(layers, 256) - at(layers, 128) for layers in (2, 1))
    return (two - one) / 128


def arithmetic(name: str) -> dict[str, Any]:
    """What a token costs in one layer on the card: bytes, seconds of them, seconds of products, and what is kept."""
    known = known_models()[name]
    config, card = AutoConfig.for_model(**known["config"]), card_of(CARD)
    layers, flops = config.num_hidden_layers, ModelFlops(**known["flops"])
    own, liger = moved(config, False), moved(config, True)
    counted = known["sizes"]["kept"]
    return {
        "model": name,
        "card": CARD,
        "layers": layers,
        "moved_own": own,
        "moved_liger": liger,
        "seconds_own": own * layers / (BANDWIDTH * card.bandwidth),
        "seconds_liger": liger * layers / (BANDWIDTH * card.bandwidth),
        "seconds_products": 3 * 2.0 * flops.body / (COMPUTE * card.flops),
        "kept_own": counted["bf16"]["layer"] * layers,
        "kept_liger": counted["bf16 liger"]["layer"] * layers,
    }


def main() -> int:
    """Measure and count everything, and write the results. Returns the exit status."""
    report = {
        **machine(),
        "prompts": PROMPTS,
        "k": K,
        "prompt_tokens": P,
        "response_tokens": R,
        "turns": TURNS,
        "measured": [measured(precision) for precision in ("fp32", "bf16")],
        "arithmetic": [arithmetic(name) for name in MODELS],
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
