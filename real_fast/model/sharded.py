"""Models that are spread over ranks from the start: each rank reads its own slices of the weights and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from real_fast.attention.interface import Backend
from real_fast.distributed.shard import shard
from real_fast.distributed.slices import TensorFiles
from real_fast.errors import ModelError
from real_fast.model.experts import is_mixture
from real_fast.model.folder import read_json, weight_files
from real_fast.model.load import check_head, without_dropout
from real_fast.model.policy import Policy, Spread
from real_fast.model.weights import check_finite

_TRIAL_VOCABULARY = 1024
_TRIAL_LAYERS = 8


def empty_model(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a Hugging Face folder in float32, without its weights: parameters on "meta", buffers as they are.

    Raises:
        ModelError: It is quantised, or a mixture of experts.
    """
    if read_json(folder / "config.json").get("quantization_config"):
        raise ModelError(
            f"the model in {folder} is quantised, and such weights cannot be spread over ranks: take the model that it "
            "was made from, or train on one GPU"
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if is_mixture(config):  # a rank whose tokens pass by an expert would wait for another's gradient of it
        raise ModelError(
            f"the model in {folder} is a mixture of experts ({config.model_type}), which is not spread over ranks yet: "
            "train it on one GPU, or take a dense model"
        )
    with _parameters_on_meta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    model.config.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    without_dropout(model)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that are made in here take no memory; buffers, which are computed, are made as they are."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def try_small_twin(model: PreTrainedModel, attention: Backend | None, device: torch.device) -> None:
    """Try what a model's kind is tried on when it is loaded whole, on a random one of few layers and tokens.

    Raises:
        ModelError: Logits that are more than the head's weight times hidden states.
        SharedPromptError: A model that cannot share prompts.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or [])
    layers = max((kinds.index(kind) + 1 for kind in set(kinds)), default=1)
    text.num_hidden_layers = min(text.num_hidden_layers, max(layers, 2), _TRIAL_LAYERS)
    if kinds:
        text.layer_types = kinds[: text.num_hidden_layers]
    text.vocab_size = min(text.vocab_size, _TRIAL_VOCABULARY)
    text.pad_token_id = None  # may be beyond it
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        twin: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    without_dropout(twin)
    twin.to(device)
    check_head(twin)
    Policy(twin, None, attention)


def spread(
    policy: Policy, mesh: DeviceMesh, dtype: torch.dtype | None = None, root_dtype: torch.dtype | None = None
) -> None:
    """Shard a policy: each layer by itself, the embedding too where it is not the head's, the rest with the root.

    Args:
        policy: Its parameters may be on "meta".
        mesh: The ranks.
        dtype: What layers' weights are gathered in, half of what is sent; None for their own. Products are computed in
            autocast's dtype in either case, and what layers hand on stays in float32, as on one process: rounded to
            bf16 from layer to layer, a gradient of SmolLM2's is off by 21 % of its size instead of 6 %.
        root_dtype: The same for embedding, last norm and head.

    Raises:
        ModelError: Layers that are not marked as such.
    """
    model: Any = policy.model
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    within = {id(inner) for layer in layers for inner in layer.modules() if inner is not layer}
    units: list[nn.Module] = [layer for layer in layers if id(layer) not in within]
    if not units:
        raise ModelError(
            f"the layers of a {model.config.model_type} model are not known (none is Transformers' "
            "GradientCheckpointingLayer), so it cannot be spread over ranks: train it on one GPU"
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is not head.weight:
        units.append(embedding)
    shard(policy, units, mesh, dtype, root_dtype)
    if dtype is not None:
        embedding.register_forward_hook(_in_float32)
    policy.spread = Spread(mesh, dtype, root_dtype)


def _in_float32(embedding: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
    return output.float()


@torch.no_grad()
def frozen_copy_of_spread(policy: Policy) -> Policy:
    """A copy of a policy that is spread over ranks, spread alike, without gradients and in evaluation mode.

    Each rank copies its own slices, in the dtype that they are kept in.
    """
    assert policy.spread is not None
    with _parameters_on_meta():
        model = type(policy.model)(copy.deepcopy(policy.model.config))
    model.tie_weights()
    without_dropout(model)
    model.requires_grad_(False)
    found = Policy(model, policy.autocast_dtype, policy.attention, tried=True)
    spread(found, policy.spread.mesh, policy.spread.dtype, policy.spread.root_dtype)
    own = {name: p for name, p in policy.model.named_parameters()}
    tensors = {id(p): own[name].detach().clone() for name, p in found.model.named_parameters()}
    _put(found.model, tensors, policy.device)
    return found.eval()


@torch.no_grad()
def read_weights(
    model: PreTrainedModel, folder: Path, device: torch.device, kept: Mapping[str, torch.dtype] | None = None
) -> None:
    """Give a sharded model the weights of a folder, each rank its slices; a head that is tied stays so.

    Args:
        model: From :func:`empty_model`, sharded.
        folder: A Hugging Face folder of safetensors files.
        device: Where this rank's slices go.
        kept: Dtypes by parameter name; float32 for those that are not named.

    Raises:
        ModelError: Weights that are missing, of another shape, of no place in the model, NaN or infinite.
    """
    files = TensorFiles(weight_files(folder))
    own = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - own.keys()
    buffers = set(dict(model.named_buffers()))
    missing = sorted(own.keys() - files.names)
    extra = sorted(n for n in files.names - own.keys() - tied - buffers if not n.endswith("rotary_emb.inv_freq"))
    if missing or extra:
        what = f"lack {missing[0]}" if missing else f"hold {extra[0]}, for which it has no place"
        raise ModelError(
            f"the weights in {folder} {what} under the names that a {type(model).__name__} has: load the model on one "
            "process with Transformers and save it anew (save_pretrained), or train on one GPU"
        )
    read: dict[int, torch.Tensor] = {}
    for name, parameter in own.items():
        if files.shape(name) != tuple(parameter.shape):
            raise ModelError(
                f"the weights in {folder} have {name} in the shape {list(files.shape(name))}, and config.json says "
                f"{list(parameter.shape)}: it belongs to another model"
            )
        local = files.local(name, parameter, (kept or {}).get(name, torch.float32))
        check_finite(folder, [(name, local)])
        read[id(parameter)] = _as_placed(local.to(device), parameter)
    for name, buffer in model.named_buffers():
        if name in files.names:
            buffer.copy_(files.whole(name))
    for name in tied & files.names:
        shared = next(n for n, p in own.items() if p is model.get_parameter(name))
        if not torch.equal(files.local(name, own[shared]), files.local(shared, own[shared])):
            raise ModelError(
                f"the weights in {folder} have a {name} of their own, and config.json ties it to {shared}: set "
                "tie_word_embeddings to false there"
            )
    _put(model, read, device)


def _put(model: nn.Module, tensors: Mapping[int, torch.Tensor], device: torch.device) -> None:
    """New parameters in the place of those of these ids, one for all that share it; buffers on the device."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None and id(old) in tensors:
                if id(old) not in made:
                    made[id(old)] = nn.Parameter(tensors[id(old)], requires_grad=old.requires_grad)
                module._parameters[name] = made[id(old)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _as_placed(local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not isinstance(like, DTensor):
        return local
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
