"""``train.compile``: each layer compiled by torch.compile, once for all layers of a kind and all lengths.

A packed row's attention stays outside the graphs, as it is: its segments would be another graph each time. Compiled
layers are in effect while an update lasts, and sampling with Transformers, whose cache grows at every token, sees none
of it.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from real_fast.attention.interface import NAME, attend
from real_fast.errors import ConfigError
from real_fast.model.experts import is_mixture


def check_compiler(device: torch.device) -> None:
    """Refuse a device that nothing can be compiled for here. Raises :class:`ConfigError`."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        raise ConfigError("train.compile is on, and TORCHDYNAMO_DISABLE=1 switches torch.compile off: unset one")
    # Private names of PyTorch's: whoever does not compile does not depend on them.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device.type == "cuda":
        if not has_triton():
            raise ConfigError("train.compile needs Triton on a GPU, which is not installed or does not know this GPU")
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        if named := os.environ.get("CXX"):
            raise ConfigError(
                f"train.compile needs a C++ compiler on a CPU, and CXX is {named!r}, which is none that runs: unset "
                "CXX or name another, or leave train.compile out"
            ) from error
        raise ConfigError(
            "train.compile needs a C++ compiler on a CPU, and none was found: install g++ (or name one in CXX), or "
            "leave train.compile out"
        ) from error


@cache
def _uncompiled() -> Any:
    """The attention as a call that torch.compile looks not into, the same object each time."""
    return torch.compiler.disable(attend)


class CompiledLayers:
    """A model's layers, compiled where :meth:`on` was called and :meth:`off` was not yet.

    Args:
        model: A Transformers model.
        backend: Of torch.compile.

    Raises:
        ConfigError: A mixture of experts; a model whose layers are not marked as such.
    """

    name = "train.compile"

    def __init__(self, model: PreTrainedModel, backend: str = "inductor") -> None:
        self.backend = backend
        if is_mixture(model.config):  # how many rows an expert gets would be a constant of the graph
            raise ConfigError(
                f"train.compile does not serve mixtures of experts ({model.config.model_type}): leave it out"
            )
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise ConfigError(
                f"train.compile does not know the layers of a {model.config.model_type} model (none is Transformers' "
                "GradientCheckpointingLayer): leave it out"
            )
        # Activation checkpointing comes before this call, and computes what is compiled a second time.
        self._layers: list[tuple[nn.Module, Any]] = [
            (layer, torch.compile(layer._call_impl, dynamic=True, backend=backend)) for layer in layers
        ]

    def on(self) -> None:
        """Compile a layer at its first call of a kind, and run what was compiled."""
        AttentionInterface.register(NAME, _uncompiled())
        for layer, compiled in self._layers:
            layer._compiled_call_impl = compiled

    def off(self) -> None:
        """Run the layers as they are."""
        AttentionInterface.register(NAME, attend)
        for layer, _ in self._layers:
            layer._compiled_call_impl = None

    def of(self, model: PreTrainedModel) -> CompiledLayers:
        """The same for another model."""
        return CompiledLayers(model, self.backend)
