"""What can be checked of settings alone: bounds, which stand beside each setting, and combinations that cannot work."""

from __future__ import annotations

import dataclasses
import math
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from real_fast.errors import ConfigError
from real_fast.utils.secret import masked

# Metadata of settings that a resumed run may change; real_fast.runs.fingerprints says what each means.
FREE, CONTENTS, CALL = {"resume": "free"}, {"resume": "contents"}, {"resume": "call"}


def above(low: float, default: Any, below: float | None = None, at_most: float | None = None, resume: str = "") -> Any:
    """A dataclass field that must be above `low` (and below, or at most, another); `resume` as FREE has it."""
    bounds = {"above": low, "below": below, "at_most": at_most}
    return dataclasses.field(default=default, metadata=bounds | {"resume": resume})


def at_least(low: float, default: Any, resume: str = "") -> Any:
    """A dataclass field that must be `low` or more; `resume` as FREE has it."""
    return dataclasses.field(default=default, metadata={"at_least": low, "resume": resume})


def finite(default: float) -> Any:
    """A dataclass field that must be a finite number."""
    return dataclasses.field(default=default, metadata={"finite": True})


def share(default: float) -> Any:
    """A dataclass field that must be 0 to 1."""
    return dataclasses.field(default=default, metadata={"share": True})


def check_bounds(settings: Any, prefix: str = "") -> None:
    """Check every field, nested ones included, against its choices, its kind of number and the bounds beside it.

    Raises:
        ConfigError: The message names the key, its value and what is allowed; NaN is within no bounds.
    """
    for field in dataclasses.fields(settings):
        key, value = prefix + field.name, getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{key}.")
        else:
            check_value(key, value, type(settings), field.name)


def check_value(key: str, value: Any, kind: type, name: str) -> None:
    """Check one value against the field `name` of the dataclass `kind`; `key` is what messages call it.

    Raises:
        ConfigError: As :func:`check_bounds` does.
    """
    bounds = next(field.metadata for field in dataclasses.fields(kind) if field.name == name)
    hint = get_type_hints(kind)[name]
    if any(get_origin(one) is Literal and value in get_args(one) for one in get_args(hint)):
        return  # a name that may stand in a number's place
    if problem := _wrong_kind(value, hint) or _problem(value, bounds):
        shown = repr(value) if isinstance(value, str) else value
        raise ConfigError(f"{key} is {shown}: it must {problem}")


def _wrong_kind(value: Any, hint: Any) -> str | None:
    """Of choices, switches and numbers; what else a setting holds is for its reader to check."""
    if get_origin(hint) is Literal:
        known = any(type(value) is type(choice) and value == choice for choice in get_args(hint))
        return None if known else f"be one of {', '.join(map(str, get_args(hint)))}"
    if hint is bool:
        return None if isinstance(value, bool) else "be True or False"
    for number, what in ((int, Integral), (float, Real)):
        if hint is number and (isinstance(value, bool) or not isinstance(value, what)):
            return "be a whole number" if number is int else "be a number"
    return None


def _problem(value: Any, bounds: Any) -> str | None:
    if bounds.get("finite"):
        return None if math.isfinite(value) else "be a finite number"
    if bounds.get("share"):
        return None if 0 <= value <= 1 else "lie between 0 and 1"
    low, high, most = bounds.get("above"), bounds.get("below"), bounds.get("at_most")
    if low is not None and high is not None:
        return None if low < value < high else f"lie between {low} and {high}"
    if low is not None and most is not None:
        return None if low < value <= most else f"be above {low} and at most {most}"
    if low is not None:
        return None if value > low else f"be above {low}"
    if (least := bounds.get("at_least")) is not None:
        return None if value >= least else f"be {least} or more"
    return None


def check_config(config: Any) -> None:
    """Check a run's settings, a :class:`real_fast.config.Config`; what one method asks for, its own ``check`` says.

    Raises:
        ConfigError: A setting that is missing or out of bounds, or settings that cannot work together.
    """
    for key in ("model", "output"):
        if not getattr(config, key):
            raise ConfigError(f"{key} is not set: give --{key} or put it into the config file")
    if not config.data.train:
        raise ConfigError("data.train is not set: give --data.train FILE_OR_HUB_DATASET")
    if config.debug and config.resume:
        raise ConfigError(
            "debug makes small runs of its own, which are not gone on with: leave out --resume or --debug"
        )
    if config.rollout.group_size < 1:
        raise ConfigError(f"rollout.group_size is {config.rollout.group_size}: at least 1 rollout per prompt is needed")
    check_url(config.rollout)
    if config.rollout.ahead and config.rollout.engine != "vllm-server":
        raise ConfigError(
            f"rollout.ahead is {config.rollout.ahead}, and rollout.engine {config.rollout.engine} samples in the "
            "trainer's process, in turn with it: set rollout.engine to vllm-server, or leave rollout.ahead out"
        )
    if config.init_from is not None:
        folder = Path(config.init_from).expanduser()
        if (folder / "config.yaml").is_file() and not (folder / "final").is_dir():
            raise ConfigError(f"init_from {config.init_from} is a run that has no final/ yet: finish it first")
    check_bounds(config)
    for name in ("batch_size", "lr") if config.warmup.steps else ():
        if not getattr(config.warmup, name) > 0:
            raise ConfigError(f"warmup.{name} is {getattr(config.warmup, name)}: it must be above 0")
    if config.train.lora is not None:
        _check_lora(config.train.lora)
        for key, value, usual in (
            ("optim.offload", config.optim.offload, ("none", "moments")),
            ("train.weights", config.train.weights, ("fp32",)),
        ):
            if value not in usual:
                raise ConfigError(
                    f"{key} is {value}, and train.lora keeps the model's weights as they are computed with, on the "
                    f"device, and its adapters in fp32: set {key} to {' or '.join(usual)}"
                )
    elif config.train.quantization != "none":
        raise ConfigError(
            f"train.quantization is {config.train.quantization}, and weights in 4 bits cannot be trained: train "
            "adapters (train.lora), or leave it out"
        )
    if config.train.compile and config.train.liger:
        raise ConfigError(
            "train.compile and train.liger are both on, and fuse the same operations in two ways: set one of them"
        )
    if config.save.merge and config.train.quantization != "none":
        raise ConfigError(
            "save.merge is true, and train.quantization keeps the model's weights in 4 bits: final/ is then the "
            "adapters, which are loaded on the model in its own precision; leave save.merge out"
        )
    if config.save.merge and config.train.lora is None:
        raise ConfigError("save.merge is true, and without train.lora there are no adapters to merge: leave it out")
    if not config.data.eval and not 0 < config.data.eval_fraction < 1:
        raise ConfigError(f"data.eval_fraction is {config.data.eval_fraction}: it must lie between 0 and 1")
    if len(config.scale.values) < 2 or len(set(config.scale.values)) != len(config.scale.values):
        raise ConfigError(f"scale.values is {config.scale.values}: at least two different scores are needed")
    if not all(map(math.isfinite, config.scale.values)):
        raise ConfigError(f"scale.values is {config.scale.values}: a score is a finite number")
    if not config.scale.phrase.strip():
        raise ConfigError("scale.phrase is empty: it is what the score stands after")


def check_url(rollout: Any) -> None:
    """Check the address of a rollout server against the engine. Raises :class:`ConfigError`."""
    url = rollout.url
    if rollout.engine != "vllm-server":
        if url:
            raise ConfigError(
                f"rollout.url is {masked(repr(url))}, and rollout.engine is {rollout.engine}, which needs no server: "
                "set rollout.engine to vllm-server, or leave rollout.url out"
            )
        return
    parts = urlsplit(url) if isinstance(url, str) else urlsplit("")
    try:
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is no number
        right = False
    if not right or parts.query or parts.fragment or "@" in parts.netloc:  # what is sent nowhere, and may be a secret
        raise ConfigError(
            f"rollout.url is {masked(repr(url))}, and rollout.engine vllm-server needs a server's address there: "
            "http://HOST:PORT, such as http://127.0.0.1:8000 (docs/vllm-server.md)"
        )


def _check_lora(lora: Any) -> None:
    """Check what bounds do not say of adapters. Raises :class:`ConfigError`."""
    if lora.dropout != 0:
        raise ConfigError(
            f"train.lora.dropout is {lora.dropout}: it must be 0, since rollouts are sampled without dropout, and what "
            "is trained must be the distribution that was sampled from"
        )
    targets = [lora.targets] if isinstance(lora.targets, str) else lora.targets
    if not targets or not all(isinstance(name, str) and name for name in targets):
        raise ConfigError(
            f"train.lora.targets is {lora.targets!r}: it must be all-linear, or names of linear layers such as "
            "[q_proj, v_proj]"
        )
