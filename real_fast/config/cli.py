"""From a YAML file and the command line to a config: the file overrides the defaults, the command line the file.

Unknown and ill-typed keys are errors that name the key.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace

from real_fast.config import Config
from real_fast.errors import ConfigError


class _Parser(ArgumentParser):
    """An argument parser whose errors are the message alone, not two pages of usage around it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            raise ConfigError(message) from ex
        print(f"{self.prog}: error: {message}\n(--help lists every setting)", file=sys.stderr)
        sys.exit(2)


def build_parser(config_class: type, prog: str, description: str) -> ArgumentParser:
    """The command line of `config_class`: ``--config FILE``, ``--print-config`` and a flag for every field."""
    parser = _Parser(prog=prog, description=description, print_config="--print-config", allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; flags after it override it.")
    parser.add_class_arguments(config_class)
    return parser


def _switches(config_class: type, argv: list[str]) -> list[str]:
    """Let ``--resume`` stand for ``--resume true``, as people type it."""
    flags = {f"--{f.name}" for f in dataclasses.fields(config_class) if f.type in ("bool", bool)}
    values = ("true", "false")
    return [
        f"{a}=true" if a in flags and b.lower() not in values else a
        for a, b in zip(argv, [*argv[1:], ""], strict=False)
    ]


def from_namespace(cls: type, values: Namespace | dict[str, Any]) -> Any:
    """Build the dataclass `cls` out of parsed values, nested dataclasses included."""
    parser = _Parser(exit_on_error=False)
    parser.add_class_arguments(cls)
    plain = values if isinstance(values, dict) else values.as_dict()
    plain = {k: v for k, v in plain.items() if k not in ("config", "print_config")}
    return cls(**parser.instantiate(parser.parse_object(plain)).as_dict())


def parse(config_class: type, prog: str, description: str, argv: list[str] | None = None) -> Any:
    """Parse the command line (and its ``--config`` file) into a `config_class`.

    A wrong key or value ends the process with status 2 and a message that names the key, as argparse does.
    """
    parser = build_parser(config_class, prog, description)
    return from_namespace(
        config_class, parser.parse_args(_switches(config_class, sys.argv[1:] if argv is None else argv))
    )


def load(path: str | Path) -> Config:
    """Read a :class:`Config` from a YAML file. Raises :class:`ConfigError` with the wrong key in its message."""
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    try:
        config: Config = from_namespace(Config, values)
    except Exception as error:
        raise ConfigError(f"{path}: {error}") from error
    return config


def dump(config: Any, path: str | Path) -> None:
    """Write a config as YAML, every key resolved."""
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")
