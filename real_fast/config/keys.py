"""The keys of a command's settings: their names, types and explanations, and what to say of one that does not exist.

A key is a field's name with its sections in front: ``rollout.max_tokens``.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from real_fast.errors import ConfigError

# What TRL, Transformers and verl call these.
_ELSEWHERE = {
    "model_name_or_path": "model",
    "output_dir": "output",
    "learning_rate": "optim.lr",
    "num_generations": "rollout.group_size",
    "max_steps": "train.steps",
    "max_prompt_length": "prompt.max_tokens",
    "max_completion_length": "rollout.max_tokens",
    "gradient_checkpointing": "train.activation_checkpointing",
    "resume_from_checkpoint": "resume",
    "torch_compile": "train.compile",
    "use_liger_kernel": "train.liger",
    "use_liger": "train.liger",
    "dtype": "precision",
    "lora_r": "train.lora.r",
    "lora_rank": "train.lora.r",
    "lora_alpha": "train.lora.alpha",
    "lora_dropout": "train.lora.dropout",
    "lora_target_modules": "train.lora.targets",
    "target_modules": "train.lora.targets",
    "init_lora_weights": "train.lora.init",
    "use_peft": "train.lora.r",
    "load_in_4bit": "train.quantization",
    "dataset_name": "data.train",
}


@dataclasses.dataclass(frozen=True)
class Key:
    """A setting.

    Attributes:
        name: With its sections, e.g. "rollout.max_tokens".
        type: Its annotation.
        default: Its value where nothing is given.
        help: What its class's docstring says of it.
    """

    name: str
    type: Any
    default: Any
    help: str

    @property
    def is_switch(self) -> bool:
        """Whether it is true or false, and so needs no value on the command line."""
        return self.type is bool

    @property
    def takes_several(self) -> bool:
        """Whether several values may follow its flag."""
        return any(get_origin(kind) is list for kind in _alternatives(self.type))

    @property
    def is_mapping(self) -> bool:
        """Whether it holds names and values of its own, such as a chat template's arguments."""
        return any(get_origin(kind) is dict for kind in _alternatives(self.type))


@lru_cache
def keys_of(settings: type) -> dict[str, Key]:
    """Every key of a dataclass of settings, those of its sections included, in order."""
    return dict(_walk(settings, settings(), ""))


@lru_cache
def sections_of(settings: type) -> dict[str, str]:
    """The names of the sections of a dataclass of settings, and what each is about."""
    hints, texts = get_type_hints(settings), _texts(settings)
    names = [field.name for field in dataclasses.fields(settings)]
    return {name: texts.get(name, "") for name in names if dataclasses.is_dataclass(hints[name])}


def _walk(settings: type, defaults: Any, prefix: str) -> Iterable[tuple[str, Key]]:
    hints, texts = get_type_hints(settings), _texts(settings)
    for field in dataclasses.fields(settings):
        kind, default = hints[field.name], getattr(defaults, field.name)
        name = prefix + field.name
        if section := section_of(kind):
            yield from _walk(section, section() if default is None else default, f"{name}.")
        else:
            yield name, Key(name, kind, default, texts.get(field.name, ""))


def section_of(kind: Any) -> type | None:
    """The dataclass of a section's annotation, such as ``LoraConfig | None``; None for a setting's."""
    return next((one for one in _alternatives(kind) if dataclasses.is_dataclass(one) and isinstance(one, type)), None)


@lru_cache
def optional_sections(settings: type, prefix: str = "") -> dict[str, type]:
    """The sections of a dataclass of settings, nested ones included, that may be None, by their names."""
    hints, found = get_type_hints(settings), {}
    for field in dataclasses.fields(settings):
        if section := section_of(hints[field.name]):
            if NoneType in _alternatives(hints[field.name]):
                found[prefix + field.name] = section
            found |= optional_sections(section, f"{prefix}{field.name}.")
    return found


def _texts(settings: type) -> dict[str, str]:
    """What the docstrings say of each field; a subclass's docstring adds to its parent's."""
    from docstring_parser import parse as parse_docstring  # for --help alone; see convert

    found = {}
    for kind in reversed(settings.__mro__):
        for field in parse_docstring(kind.__doc__ or "").params:
            found[field.arg_name] = " ".join((field.description or "").split())
    return found


def flatten(
    settings: type,
    values: Mapping[Any, Any],
    where: Callable[[str], str] = lambda name: "",
    other_names: Mapping[str, str] | None = None,
    tell: Callable[[str], None] = lambda message: None,
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Bring nested values under their keys, each converted to its type.

    Args:
        settings: The dataclass.
        values: Nested mappings, or keys with dots, or both.
        where: What stands in front of a message about a name: a file and its line, or "--" for a flag.
        other_names: Names that mean a key of `settings` here.
        tell: Gets a message for each of those that is used.
        known: What was given before, by key: names of a mapping that come one by one are added to its own.

    Raises:
        ConfigError: A name that does not exist, or a value of another type.
    """
    keys, optional, found = keys_of(settings), optional_sections(settings), {}
    pending = [(str(name), value) for name, value in values.items()]
    while pending:
        name, value = pending.pop(0)
        own = (other_names or {}).get(name)
        if own:
            tell(f"{where(name)}{name} is called {own} here, and is taken for it")
        name_here = own or name
        if name_here in keys and not _is_section_elsewhere(name, value, other_names or {}):
            found[name_here] = convert(keys[name_here], value, where(name), name)
        elif is_section(name_here, keys) or is_section(name_here, other_names or {}):
            value = _read_inline(value)
            if name_here in optional and not (value and isinstance(value, Mapping)):
                found[name_here] = _switched(value, f"{where(name)}{name}")
                continue
            if value is not None and not isinstance(value, Mapping):
                raise ConfigError(
                    f"{where(name)}{name} is {_show(value)}: it is a section, whose settings stand under it by name"
                )
            pending[:0] = [(f"{name}.{inner}", v) for inner, v in (value or {}).items()]
        elif (owner := name_here.rpartition(".")[0]) in keys and keys[owner].is_mapping:
            before = {owner: keys[owner].default, **(known or {}), **found}[owner]
            inner = {name_here.rpartition(".")[2]: _read_inline(value)}
            found[owner] = convert(keys[owner], {**before, **inner} if isinstance(before, dict) else inner, where(name))
        else:
            raise ConfigError(f"{where(name)}{name} is no setting{hint(name, keys)}")
    return found


def _switched(value: Any, name: str) -> bool:
    """Whether a section that may be None is there, where no setting of it is given. Raises :class:`ConfigError`."""
    if value is None or value is False or value == "none":
        return False
    if value is True or value == {}:
        return True
    raise ConfigError(f"{name} is {_show(value)}: it is a section, whose settings stand under it by name, or null")


def _is_section_elsewhere(name: str, value: Any, other_names: Mapping[str, str]) -> bool:
    """Whether what a key here got is another command's section of that name, such as train's data in evaluate."""
    return isinstance(value, Mapping) and bool(value) and all(f"{name}.{inner}" in other_names for inner in value)


def is_section(name: str, keys: Iterable[str]) -> bool:
    """Whether keys stand under a name."""
    return any(key.startswith(f"{name}.") for key in keys)


def convert(key: Key, value: Any, where: str = "", name: str = "") -> Any:
    """Convert a value from a file or a flag to the key's type. Raises :class:`ConfigError`."""
    if key.is_switch and isinstance(value, str) and value.lower() in ("yes", "no", "on", "off", "1", "0"):
        return value.lower() in ("yes", "on", "1")
    from jsonargparse import ArgumentParser  # a run that is started from Python reads no text, and needs it not

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=key.type)
    try:
        return parser.parse_object({"value": value})["value"]
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        said = f"{where}{name or key.name} is {_show(value)}: it must be {_expected(key.type)}"
        raise ConfigError(said + _close_value(value, key.type)) from error


def hint(name: str, keys: Mapping[str, Any]) -> str:
    """ "; did you mean ...?" for a name that is none, or nothing where no key is close."""
    last = name.rpartition(".")[2]
    elsewhere = next((k for k in keys if k.endswith(_ELSEWHERE.get(last, " "))), None)
    same = [key for key in keys if key.rpartition(".")[2] == last]
    close = get_close_matches(name, keys, n=1, cutoff=0.75)
    by_last = {key.rpartition(".")[2]: key for key in reversed(list(keys))}
    similar = [by_last[found] for found in get_close_matches(last, by_last, n=1, cutoff=0.75)]
    found = [elsewhere] if elsewhere else same or close or similar
    return f"; did you mean {' or '.join(map(str, found[:3]))}?" if found else ""


def one_of(what: str, value: str, choices: Iterable[str]) -> str:
    """The message for a name that is none of a few: which it may be, and which was probably meant."""
    choices = list(choices)
    close = get_close_matches(value.lower(), choices, n=1)
    return (
        f"{what} is {value!r}: "
        + (f"did you mean {close[0]}? There are " if close else "there are ")
        + ", ".join(choices)
    )


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _choices(kind: Any) -> list[str]:
    """The names that a value may be, where they are few."""
    found: list[str] = []
    for one in _alternatives(kind):
        inner = get_args(one)[0] if get_origin(one) is list else one
        found += [str(choice) for choice in get_args(inner)] if get_origin(inner) is Literal else []
    return list(dict.fromkeys(found))


def _expected(kind: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    parts = []
    for one in _alternatives(kind):
        if get_origin(one) is Literal:
            parts.append("one of " + ", ".join(map(str, get_args(one))))
        elif get_origin(one) is list:
            (inner,) = get_args(one)
            parts.append("a list" if inner is Any else f"a list, each {_expected(inner)}")
        elif get_origin(one) is dict:
            parts.append("names with values, such as {name: value}")
        else:
            parts.append(words.get(one, str(one)))
    return " or ".join(parts)


def _close_value(value: Any, kind: Any) -> str:
    if kind is str and not isinstance(value, str):
        return " (put it into quotes)" if isinstance(value, int | float) else ""
    given = value if isinstance(value, list) else [value]
    choices = _choices(kind)
    wrong = [one for one in given if isinstance(one, str) and one not in choices]
    close = get_close_matches(wrong[0].lower(), choices, n=1) if wrong else []
    return f"; did you mean {close[0]}?" if close else ""


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read_inline(value: Any) -> Any:
    """A value as YAML reads it, where a flag gave it as text."""
    if not isinstance(value, str):
        return value
    import yaml

    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value
