"""What can be checked of a Judge's arguments before anything is looked for on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import wraps
from inspect import iscoroutinefunction, signature
from numbers import Real
from typing import Any, ParamSpec, TypeVar, cast

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
# Settings that stand within an argument.
_WITHIN = {"rollout": RolloutConfig, "prompt": PromptConfig, "scale": ScaleConfig}

P = ParamSpec("P")
R = TypeVar("R")


def known_arguments(call: Callable[P, R]) -> Callable[P, R]:
    """Let a function say which keyword arguments it has where it is given another; raises :class:`ConfigError`."""
    known = [name for name in signature(call).parameters if name != "self"]
    what = call.__qualname__.partition(".")[0] if call.__name__ == "__init__" else call.__name__

    @wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        refuse_unknown(what, kwargs, known)
        return call(*args, **kwargs)

    @wraps(call)
    async def awaited(*args: P.args, **kwargs: P.kwargs) -> Any:
        refuse_unknown(what, kwargs, known)
        return await cast(Any, call(*args, **kwargs))

    return cast(Callable[P, R], awaited) if iscoroutinefunction(call) else checked


def refuse_unknown(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse arguments that `what` does not have: which there are, and what was probably meant.

    Raises:
        ConfigError: One of `given` is not `known`.
    """
    known = list(known)
    for name in given:
        if name in known:
            continue
        within = [
            f"{argument}={kind.__name__}({name}=...)" if argument == "scale" else f"{argument}={{{name!r}: ...}}"
            for argument, kind in _WITHIN.items()
            if argument in known and name in {field.name for field in fields(kind)}
        ]
        meant = within or get_close_matches(name, known, n=1)
        raise ConfigError(
            f"{what} has no argument {name!r}"
            + (f": did you mean {' or '.join(meant)}?" if meant else ".")
            + f" It takes {', '.join(known)}"
        )


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
