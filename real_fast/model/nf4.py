"""Weights in 4 bits under adapters (QLoRA, arXiv 2305.14314), by bitsandbytes, which is imported where it is used."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from real_fast.errors import ConfigError


def quantization(compute: torch.dtype) -> Any:
    """How Transformers keeps a model's linear layers but the head: nf4, its scales quantised again.

    Args:
        compute: Dtype of the products, for which the weights are unpacked.

    Raises:
        ConfigError: bitsandbytes, or accelerate, which Transformers loads such a model with, is missing.
    """
    for package in ("bitsandbytes", "accelerate"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(
                f"train.quantization nf4 needs {package}, which cannot be imported ({error}): "
                "pip install 'real-fast[bitsandbytes]'"
            ) from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def keep_trainable(model: Any) -> None:
    """Keep bitsandbytes from packing weights anew on a CPU with bf16 instructions when the model samples.

    What it packs for sampling has no gradient, and is not packed back for training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def answer_in(model: Any, dtype: torch.dtype) -> None:
    """Let the layers in 4 bits answer in what they compute in, as autocast's linear layers do.

    bitsandbytes widens their answers to what came in, which is float32 behind a norm: activations that wait for the
    backward pass would take twice the room.
    """

    def narrowed(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return given[0].to(dtype), *given[1:]

    for module in model.modules():
        if is_packed(getattr(module, "weight", None)):
            module.register_forward_pre_hook(narrowed)


def is_packed(parameter: Any) -> bool:
    """Whether a parameter is one of bitsandbytes' in 4 bits."""
    return getattr(parameter, "quant_state", None) is not None


def unpacked(parameter: Any) -> torch.Tensor:
    """A weight in 4 bits in its own shape, as it is computed with, in float32."""
    functional = importlib.import_module("bitsandbytes.functional")
    found: torch.Tensor = functional.dequantize_4bit(parameter.data, parameter.quant_state)
    return found.float()


def numel(parameter: Any) -> int:
    """Numbers that a parameter stands for."""
    return int(parameter.quant_state.shape.numel()) if is_packed(parameter) else int(parameter.numel())
