"""Counts of a model from its config: parameters, matrices, and the activations that a token keeps.

Nothing is allocated: the model runs on fake tensors, and what autograd would keep is added up. This is the part of the
plan that needs PyTorch and Transformers.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from real_fast.attention.interface import NAME, prepare, prepared_mask
from real_fast.attention.layout import Layout
from real_fast.attention.support import known_reason
from real_fast.config import LoraConfig
from real_fast.model.lora import add_adapters


def empty_model(config: Any) -> PreTrainedModel:
    """A causal language model of a config, without memory for its weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def sizes(config: Any) -> dict[str, Any]:
    """What :meth:`real_fast.planning.memory.ModelSizes.read` takes.

    Activations with adapters are counted where peft can be imported.
    """
    model = empty_model(config)
    text = model.config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    targets: dict[str, int] = {}
    for name, module in linear.items():
        last = name.rpartition(".")[2]
        targets[last] = targets.get(last, 0) + module.in_features + module.out_features
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    single, double = (sum(p.numel() for p in empty_model(with_layers(config, n)).parameters()) for n in (1, 2))
    kept = {precision: _kept(config, precision) for precision in ("bf16", "fp32")}
    kept["bf16 weights"] = _kept(config, "bf16", torch.bfloat16)
    if importlib.util.find_spec("peft") is not None:
        for precision in ("bf16", "fp32"):
            low, high = (_kept(config, precision, rank=rank) for rank in (8, 16))
            rank = (high["layer"] - low["layer"]) / 8
            kept[f"{precision} adapters"] = low | {"layer": low["layer"] - 8 * rank, "rank": rank}
    for mode, counted in list(kept.items()):  # an adapter's own activations are the same
        precision, _, what = mode.partition(" ")
        weights = torch.bfloat16 if what == "weights" else torch.float32
        try:
            with_it = _kept(config, precision, weights, rank=8 if what == "adapters" else 0, liger=True)
        except (TypeError, RuntimeError):  # layers of another make than those that Liger has kernels for
            break
        own = {"layer": with_it["layer"] - 8 * counted["rank"], "rank": counted["rank"]} if "rank" in counted else {}
        kept[f"{mode} liger"] = with_it | own
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layer": double - single,
        "head": head.weight.numel(),
        "tied": head.weight is embedding,
        "layers": text.num_hidden_layers,
        "targets": targets,
        "linear": sum(m.weight.numel() for m in linear.values()),
        "largest": max(m.weight.numel() for m in linear.values()),
        "kv_width": 2 * heads * size,
        "hidden": text.hidden_size,
        "kept": kept,
        "window": _window(text, any),
    }


def matrices(config: Any) -> dict[str, Any]:
    """The fields of :class:`real_fast.planning.flops.ModelFlops`. Raises ValueError as that says."""
    model = empty_model(config)
    text = model.config.get_text_config()
    embeddings = {id(m.weight) for m in model.base_model.modules() if isinstance(m, nn.Embedding)}
    weights = [p for p in model.base_model.parameters() if id(p) not in embeddings]
    if any(p.dim() > 2 for p in weights):
        raise ValueError(f"{text.model_type} has stacked experts or convolutions, whose work is not counted")
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return {
        "body": sum(p.numel() for p in weights if p.dim() == 2),
        "attention": text.num_hidden_layers * text.num_attention_heads * size,
        "head": model.get_output_embeddings().weight.numel(),
        "window": _window(text, all),
    }


def _window(text: Any, which: Callable[[Iterable[bool]], bool]) -> int | None:
    """The window of sliding attention where any or all of the layers have one."""
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"]
    return getattr(text, "sliding_window", None) if which(kind == "sliding_attention" for kind in kinds) else None


def with_layers(config: Any, layers: int) -> Any:
    """The config with so many layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def _kept(
    config: Any, precision: str, weights: torch.dtype = torch.float32, rank: int = 0, liger: bool = False
) -> dict[str, float]:
    """The fields of :class:`real_fast.planning.memory.Kept`: what autograd keeps of the body's forward pass.

    The difference between two lengths: what does not grow with the tokens, such as autocast's copies of weights, is
    counted elsewhere.
    """

    def per_token(layers: int) -> float:
        few, many = (_kept_at(config, layers, precision, weights, rank, liger, tokens) for tokens in (128, 256))
        return (many - few) / 128

    one, two = per_token(1), per_token(2)
    boundary = weights.itemsize * config.get_text_config().hidden_size
    return {"layer": two - one, "other": one - (two - one), "boundary": float(boundary)}


def _kept_at(
    config: Any, layers: int, precision: str, weights: torch.dtype, rank: int, liger: bool, tokens: int
) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(with_layers(config, layers), dtype=weights)
    if rank:
        add_adapters(model, LoraConfig(r=rank), "")
    with FakeTensorMode():
        stand_in(model)
        inputs: dict[str, Any] = {}
        if known_reason(model) is None:
            model.set_attn_implementation(NAME)
            row = Layout(torch.zeros(1, 4, dtype=torch.int64))
            inputs = {
                "shared_prompt": prepare(row, "sdpa", torch.device("cpu")),
                "attention_mask": prepared_mask(torch.device("cpu")),
            }
        known = {p.untyped_storage()._cdata for p in model.parameters()}
        seen: dict[int, int] = {}
        kept: list[torch.Tensor] = []  # alive to the end, or another tensor could take over a storage's address

        def pack(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in known:
                seen[storage._cdata] = storage.nbytes()
            kept.append(x)
            return x

        ids = torch.zeros(1, tokens, dtype=torch.int64)
        with (
            keeps_as_liger(model) if liger else nullcontext(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            model.train()
            model.base_model(
                input_ids=ids, position_ids=torch.arange(tokens)[None], use_cache=False, **inputs
            ).last_hidden_state.sum()
    return sum(seen.values())


class _Norm(torch.autograd.Function):
    """Keeps what Liger's RMSNorm does, its input and a number for each row, and passes over as many bytes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.saved_tensors[0] + grad


class _SwiGlu(torch.autograd.Function):
    """Keeps what Liger's SwiGLU does, its two inputs, and passes over as many bytes."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return gate + up

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return gate + grad, up.clone()


class _Rotary(torch.autograd.Function):
    """Keeps what Liger's rotary embedding does, cosines and sines. It turns queries and keys in place."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        ctx.save_for_backward(cos, sin)
        return q.clone(), k.clone()

    @staticmethod
    def backward(ctx: Any, q: torch.Tensor, k: torch.Tensor) -> Any:
        return q.clone(), k.clone(), None, None


def _swiglu(module: Any, x: torch.Tensor) -> Any:
    return module.down_proj(_SwiGlu.apply(module.gate_proj(x), module.up_proj(x)))


@contextmanager
def keeps_as_liger(model: nn.Module) -> Iterator[None]:
    """The model with layers that keep and move what Liger's kernels would, and compute nothing of use."""
    code = importlib.import_module(type(model).__module__)
    rotary = getattr(code, "apply_rotary_pos_emb", None)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.__dict__["forward"] = _Norm.apply
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
            module.__dict__["forward"] = partial(_swiglu, module)
    if rotary is not None:
        vars(code)["apply_rotary_pos_emb"] = lambda q, k, cos, sin, *_, **__: _Rotary.apply(q, k, cos, sin)
    try:
        yield
    finally:
        if rotary is not None:
            vars(code)["apply_rotary_pos_emb"] = rotary


def stand_in(model: nn.Module) -> None:
    """Put fake tensors on the CPU in the place of a meta model's, since autocast works there. In a fake mode."""
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                made = done.setdefault(id(parameter), nn.Parameter(empty, requires_grad=parameter.requires_grad))
                module._parameters[name] = made
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
