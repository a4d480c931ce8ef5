"""Low-rank adapters (LoRA, arXiv 2106.09685) on a Transformers model, by peft, which is imported where one is used.

peft puts its layers into the model itself, in place of linear ones; the model stays the Transformers class that it was.
The model's own weights get no gradient and are never written to: merged weights are made out of place, a tensor at a
time. A folder of adapters is peft's: adapter_config.json and adapter_model.safetensors.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from real_fast.config import LoraConfig
from real_fast.distributed.shard import whole
from real_fast.errors import ConfigError, ModelError
from real_fast.model import nf4
from real_fast.model.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json

_NAME = "default"  # peft's own name for a model's only adapter
_PREFIX = "base_model.model."  # of every name in peft's files
# Of an adapter's config: what changes the function that its weights stand for.
_MEANING = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias")


def import_peft() -> Any:
    """peft. Raises :class:`ConfigError` where it cannot be imported."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(
            f"adapters (train.lora) need peft, which cannot be imported ({error}): pip install 'real-fast[peft]'"
        ) from error


def is_adapted(model: Any) -> bool:
    """Whether adapters are in the model."""
    return bool(getattr(model, "peft_config", None))


def rank_of(model: Any) -> int | None:
    """The rank of a model's adapters, the largest where layers differ; None where it has none."""
    if not is_adapted(model):
        return None
    config = model.peft_config[_NAME]
    return max(config.r, *config.rank_pattern.values()) if config.rank_pattern else int(config.r)


def add_adapters(model: Any, settings: LoraConfig, base: str) -> None:
    """Put fresh adapters (B = 0, so that they change nothing yet) into a model, in place, in float32.

    They alone require gradients afterwards. A starts from torch's random state.

    Args:
        model: A Transformers causal language model without adapters.
        settings: ``train.lora``.
        base: What the model is called in the adapters' folder: a hub name or a path.

    Raises:
        ConfigError: peft is missing, or ``targets`` names no layer, one that is no linear layer, or the head.
    """
    targets = _targets(settings)
    config = import_peft().LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear" if targets is None else targets,
        init_lora_weights=settings.init if settings.init != "default" else True,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    _check_targets(model, targets or [])
    _inject(model, config)


def _targets(settings: LoraConfig) -> list[str] | None:
    """The names of the layers that get adapters; None for all linear ones."""
    names = [settings.targets] if isinstance(settings.targets, str) else settings.targets
    return None if names == ["all-linear"] else names


def _check_targets(model: Any, targets: list[str]) -> None:
    """Refuse targets that are not there or cannot have an adapter. Raises :class:`ConfigError`."""
    modules, head = dict(model.named_modules()), model.get_output_embeddings()
    linear = sorted(
        {name.rpartition(".")[2] for name, m in modules.items() if isinstance(m, nn.Linear) and m is not head}
    )
    for target in targets:
        found = [m for name, m in modules.items() if name == target or name.endswith(f".{target}")]
        if any(module is head for module in found):
            raise ConfigError(
                f"train.lora.targets names the head ({target}): the loss reads the head's own weight, and would pass "
                "over an adapter there; leave it out"
            )
        if not found or not all(isinstance(module, nn.Linear) for module in found):
            what = "no layer of this model" if not found else f"a {type(found[0]).__name__}, which is no linear layer"
            raise ConfigError(f"train.lora.targets names {target}, {what}: it has {', '.join(linear)} (or all-linear)")


def _inject(model: Any, config: Any) -> None:
    with _whole_shapes(model):
        import_peft().inject_adapter_in_model(config, model, adapter_name=_NAME)
    for parameter in _adapters(model).values():
        parameter.data = parameter.data.float()  # peft makes them in the base's dtype


@contextmanager
def _whole_shapes(model: Any) -> Iterator[None]:
    """Tensors of the whole shape, without its memory, for weights that are spread over ranks.

    peft takes a slice for the weight of a layer that computes with it alone (tensor parallelism).
    """
    sharded = []
    for module in model.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, DTensor):
                sharded.append((module, name, weight))
    for module, name, weight in sharded:
        shape = torch.zeros(1, dtype=weight.dtype, device=weight.device).expand(weight.shape)
        module._parameters[name] = nn.Parameter(shape, requires_grad=False)
    try:
        yield
    finally:
        for module, name, weight in sharded:
            module._parameters[name] = weight


def _adapters(model: Any) -> dict[str, nn.Parameter]:
    """The parameters of the adapters by their names in the model."""
    parts = [getattr(layer, part) for _, layer in _layers(model) for part in layer.adapter_layer_names]
    own = {id(parameter) for part in parts for parameter in part.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in own}


def load_adapters(model: Any, folder: Path) -> None:
    """Put the adapters of a folder into a model without any, in float32, as their config says.

    Raises:
        ConfigError: peft is missing.
        ModelError: They are those of another model.
    """
    _inject(model, import_peft().LoraConfig.from_pretrained(str(folder)))
    read_adapters(model, folder)


@torch.no_grad()
def read_adapters(model: Any, folder: Path) -> None:
    """Give the adapters that are in a model the weights of a folder.

    Raises:
        ModelError: The folder's have other layers, shapes, or another scale.
    """
    own, found = adapter_tensors(model), load_file(folder / ADAPTER_WEIGHTS)
    of_folder, mine = read_json(folder / ADAPTER_CONFIG), model.peft_config[_NAME].to_dict()
    other = [key for key in _MEANING if key in of_folder and (of_folder[key] or None) != (mine.get(key) or None)]
    wrong = sorted(own.keys() ^ found.keys())
    wrong += [name for name in own if name in found and own[name].shape != found[name].shape]
    if other or wrong:
        said = [f"{key} is {of_folder[key]} there and {mine.get(key)} here" for key in other]
        said += (
            [f"they differ in {_short(wrong[0])}" + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")]
            if wrong
            else []
        )
        raise ModelError(
            f"the adapters in {folder} are others than this model's: {'; '.join(said)}. Give train.lora the values "
            "that they were made with, or start from the merged model (save.merge) with new ones"
        )
    for name, tensor in found.items():
        own[name].copy_(tensor)


def _short(name: str) -> str:
    return name.removeprefix(_PREFIX)


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The adapters' weights under their names in peft's files; they share the parameters' memory."""
    # Embeddings have no adapters here, and looking whether they should be saved may ask the hub.
    found = import_peft().get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False)
    return {_PREFIX + name: tensor.detach() for name, tensor in found.items()}


def save_adapters(model: Any, folder: Path) -> None:
    """Write the adapters into a folder in peft's format, in float32; what loads adapters, such as vLLM, takes it.

    Args:
        model: A model with adapters.
        folder: An existing folder.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter_tensors(model).items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    save_adapter_config(model, folder)


def save_adapter_config(model: Any, folder: Path) -> None:
    """Write what peft has to know of the adapters, without their weights, into an existing folder."""
    config = model.peft_config[_NAME].to_dict() | {"inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    text = json.dumps(plain, indent=2, sort_keys=True, default=str)
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """peft's layers, by the name of the layer that each stands for."""
    layer = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
    return ((name, module) for name, module in model.named_modules() if isinstance(module, layer))


@torch.no_grad()
def merged_tensors(
    model: Any, dtype: torch.dtype | None = None, adapters_too: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight under its Transformers name, the adapters' product added to it, made out of place one at a time.

    W + alpha / r * B A is computed in float32 and rounded once; the model is left as it is. A tied head comes once.
    Weights in 4 bits are unpacked.

    Args:
        model: A model, with adapters or without.
        dtype: Of floating-point tensors; None for each weight's own (float32 of those in 4 bits).
        adapters_too: Without, the weights are those under the adapters.
    """
    adapted = is_adapted(model)
    layers, adapters = (dict(_layers(model)), _adapters(model)) if adapted else ({}, {})
    for name, parameter in model.named_parameters():
        if name in adapters:
            continue
        tensor = nf4.unpacked(parameter) if nf4.is_packed(parameter) else whole(parameter)
        owner, _, last = name.rpartition(".")
        layer = layers.get(owner.removesuffix(".base_layer"))
        if layer is not None:
            name = f"{owner.removesuffix('.base_layer')}.{last}"
        if layer is not None and last == "weight" and adapters_too:
            exact = torch.promote_types(tensor.dtype, torch.float32)
            tensor = (tensor.to(exact) + layer.get_delta_weight(_NAME).to(exact)).to(dtype or tensor.dtype)
        yield name, tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The model without its adapters, which stay in their place."""
    layers = [layer for _, layer in _layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)  # and they require gradients again


def adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the adapters' weights, by their names in the model."""
    return {name: parameter.detach().clone() for name, parameter in _adapters(model).items()}


def change_nothing(state: dict[str, torch.Tensor]) -> bool:
    """Whether adapters of these weights (:func:`adapter_state`) add 0 to everything: every B is 0."""
    return not any(tensor.any() for name, tensor in state.items() if ".lora_B." in name)


@contextmanager
def other_adapters(model: Any, state: dict[str, torch.Tensor]) -> Iterator[None]:
    """The model with other weights in its adapters (:func:`adapter_state`), exchanged and not copied."""

    def exchange() -> None:
        for name, parameter in _adapters(model).items():
            parameter.data, state[name] = state[name], parameter.data

    exchange()
    try:
        yield
    finally:
        exchange()


def describe(model: Any) -> str:
    """How many parameters are trained, as peft's users know it; of adapters also where they are."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(map(nf4.numel, model.parameters()))
    line = f"trainable parameters: {trained:,} of {total:,} ({trained / total:.2%})"
    if not is_adapted(model):
        return line
    names = [name.rpartition(".")[2] for name, _ in _layers(model)]
    kinds = ", ".join(dict.fromkeys(names))
    return f"{line}, LoRA of rank {model.peft_config[_NAME].r} on {len(names)} layers ({kinds})"


def merge(model: Any) -> Any:
    """The plain model, the adapters merged into its weights in their dtype and gone; all weights require gradients.

    In place, for a model that was only just loaded.
    """
    for name, layer in list(_layers(model)):
        base = layer.get_base_layer()
        with torch.no_grad():
            base.weight += layer.get_delta_weight(_NAME).to(base.weight.dtype)
        model.set_submodule(name, base)
    del model.peft_config
    return model.requires_grad_(True)
