"""``train.liger``: Liger's Triton kernels for RMSNorm, rotary embedding and SwiGLU (arXiv 2410.10989).

Liger changes a model's layers, and Transformers' module for every model of its kind with them. Here that is undone at
once, and in effect again while an update lasts: another model, on another device, keeps what it had.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from real_fast.errors import ConfigError

_PARTS = ("rms_norm", "rope", "swiglu")


def import_liger(device: torch.device) -> Any:
    """Liger's functions for Transformers.

    Raises:
        ConfigError: It is not installed, or the device cannot run Triton.
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"train.liger needs a GPU, and this run is on {device.type}: leave it out")
    try:
        return importlib.import_module("liger_kernel.transformers.monkey_patch")
    except ImportError as error:
        raise ConfigError(
            f"train.liger needs liger-kernel, which cannot be imported ({error}): pip install 'real-fast[liger]'"
        ) from error


class LigerLayers:
    """Liger's kernels in a model's layers, where :meth:`on` was called and :meth:`off` was not yet.

    Args:
        model: A Transformers model.

    Raises:
        ConfigError: Liger has no such kernels for it.
    """

    name = "train.liger"

    def __init__(self, model: PreTrainedModel) -> None:
        change = _change_of(model)
        places = list(_places(model))
        before = [dict(place) for place in places]
        reason: Exception | None = None
        try:
            change()
        except Exception as error:  # Liger's own refusals, of any kind
            reason = error
        self._changes = [
            (place, name, old.get(name, _ABSENT), new)
            for place, old in zip(places, before, strict=True)
            for name, new in place.items()
            if new is not old.get(name, _ABSENT)
        ]
        self._undo: list[tuple[dict[str, Any], str, Any]] = [
            (place, name, old) for place, name, old, _ in self._changes
        ]
        self.off()
        if reason is not None:
            raise ConfigError(
                f"train.liger: Liger cannot serve a {model.config.model_type} model "
                f"({type(reason).__name__}: {reason}): leave it out"
            ) from reason

    def on(self) -> None:
        """Run Liger's kernels; :meth:`off` gives back what is there now."""
        if not self._undo:
            self._undo = [(place, name, place.get(name, _ABSENT)) for place, name, _, _ in self._changes]
            for place, name, _, new in self._changes:
                place[name] = new

    def off(self) -> None:
        """Run Transformers' own code."""
        for place, name, old in self._undo:
            if old is _ABSENT:
                place.pop(name, None)
            else:
                place[name] = old
        self._undo = []

    def of(self, model: PreTrainedModel) -> LigerLayers:
        """The same for another model."""
        return LigerLayers(model)


_ABSENT = object()


def _places(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Where Liger changes something: the module that the model's class is in, and every layer."""
    yield vars(importlib.import_module(type(model).__module__))
    for module in model.modules():
        yield vars(module)


def _change_of(model: PreTrainedModel) -> Callable[[], None]:
    """What puts Liger's kernels into a model. Raises :class:`ConfigError`."""
    liger = importlib.import_module("liger_kernel.transformers.monkey_patch")
    known: dict[str, Any] = liger.MODEL_TYPE_TO_APPLY_LIGER_FN
    kind = model.config.model_type
    if kind not in known:
        raise ConfigError(
            f"train.liger: Liger has no kernels for a {kind} model, but for {', '.join(sorted(known))}: leave it out"
        )
    takes = inspect.signature(known[kind]).parameters
    if missing := [part for part in _PARTS if part not in takes]:
        raise ConfigError(f"train.liger: Liger has no {', '.join(missing)} for a {kind} model: leave it out")
    loss = {name: False for name in ("cross_entropy", "fused_linear_cross_entropy") if name in takes}
    return partial(known[kind], model=model, **dict.fromkeys(_PARTS, True), **loss)
