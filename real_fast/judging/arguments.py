"""What can be checked of a Judge's arguments before anything is looked for on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from real_fast.config import Config, EvalConfig, ObjectiveConfig, PromptConfig, RolloutConfig, ScaleConfig, TrainConfig
from real_fast.config.validation import check_value
from real_fast.errors import ConfigError

# Arguments that stand for a setting, which has their choices and bounds.
_SETTINGS: dict[str, tuple[type, str]] = {
    "engine": (RolloutConfig, "engine"),
    "n": (EvalConfig, "n"),
    "temperature": (EvalConfig, "temperature"),
    "protocol": (EvalConfig, "protocol"),
    "renormalize": (ObjectiveConfig, "renormalize"),
    "precision": (TrainConfig, "precision"),
    "device": (TrainConfig, "device"),
    "trust_remote_code": (Config, "trust_remote_code"),
}
_OPTIONAL = ("protocol", "renormalize")  # None: the folder's


def check_arguments(*, scale: Any, prompt: Any, rollout: Any, **settings: Any) -> None:
    """Check a Judge's arguments.

    Args:
        scale: None, a ScaleConfig or different numbers.
        prompt: None, a mapping or a PromptConfig.
        rollout: None, a mapping or a RolloutConfig.
        settings: The others.

    Raises:
        ConfigError: The message names the argument, its value and what is allowed.
    """
    for name, value in settings.items():
        if value is not None or name not in _OPTIONAL:
            check_value(name, value, *_SETTINGS[name])
    for name, value, kind, example in (
        ("prompt", prompt, PromptConfig, {"template": "short"}),
        ("rollout", rollout, RolloutConfig, {"max_tokens": 256}),
    ):
        if value is not None and not isinstance(value, Mapping | kind):
            raise ConfigError(f"{name} is {value!r}: give a mapping such as {example}, or a {kind.__name__}")
    if scale is None or isinstance(scale, ScaleConfig):
        return
    scores = list(scale) if isinstance(scale, Iterable) and not isinstance(scale, str | bytes | Mapping) else []
    if len({s for s in scores if isinstance(s, Real) and math.isfinite(s)}) != len(scores) or len(scores) < 2:
        raise ConfigError(f"scale is {scale!r}: give at least two different numbers, such as [1, 2, 3, 4, 5]")


def check_model(model: Any) -> None:
    """Refuse what is no model that writes text, as far as shows before it is looked for on disk.

    Raises:
        ConfigError: An empty name, or an object that is no loaded causal language model.
    """
    if isinstance(model, str | os.PathLike):
        known = bool(str(model))
    else:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        known = hasattr(model, "config") and head is not None and not getattr(model.config, "is_encoder_decoder", False)
    if not known:
        shown = type(model).__name__ if callable(model) else repr(model)
        raise ConfigError(
            f"model is {shown}: give a folder, a hub name or a loaded causal language model, which "
            "Transformers' AutoModelForCausalLM gives"
        )
