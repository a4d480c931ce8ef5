"""``--help``: the settings that most runs change; ``--help all`` and ``--help SECTION`` show the others."""

from __future__ import annotations

import json
import shutil
import textwrap
from typing import Any, get_args, get_origin

from real_fast.config.commands import Command
from real_fast.config.keys import Key, hint, is_section, keys_of, sections_of
from real_fast.errors import ConfigError

_ALWAYS = {
    "--config FILE": 'A YAML file of settings, or one of the package, e.g. "quickstart"; flags override it.',
    "--print_config": "Print every setting as it would be used, as YAML.",
    "--version": "Print the versions of real-fast and of what it stands on.",
}


def help_text(prog: str, command: Command, topic: str = "") -> str:
    """The text of ``--help [TOPIC]``.

    Args:
        prog: The command's name.
        command: The command.
        topic: "" for the main settings, "all", a section, or one setting.

    Raises:
        ConfigError: There is no such topic.
    """
    keys = {name: key for name, key in keys_of(command.settings).items() if not name.startswith(command.unused or "?")}
    sections = {name: text for name, text in sections_of(command.settings).items() if is_section(name, keys)}
    if topic and topic != "all":
        chosen = [key for name, key in keys.items() if name == topic or name.startswith(f"{topic}.")]
        if not chosen:
            raise ConfigError(f"--help {topic}: there is no such setting or section{hint(topic, {**keys, **sections})}")
        return "\n".join(_lines(chosen, short=False))
    lines = [f"usage: {prog} {command.usage}", "", command.about, ""]
    lines += [line for flag, text in _ALWAYS.items() for line in _entry(flag, text)]
    if topic == "all":
        lines += ["", *_lines([key for key in keys.values() if "." not in key.name], short=False)]
        for section, text in sections.items():
            inner = [key for key in keys.values() if key.name.startswith(f"{section}.")]
            lines += ["", f"{section}: {text}", *_lines(inner, short=False)]
        return "\n".join(lines)
    lines += ["", *_lines([keys[key] for key in command.main if key in keys], short=True)]
    if others := [key for key in keys if key not in command.main]:
        topics = ", ".join([*sections, "or one setting"])
        lines += ["", *textwrap.wrap(f"{len(others)} more: {prog} --help all, or --help with {topics}.", _width())]
    switch = next(name for name, key in reversed(list(keys.items())) if key.is_switch)
    lines += [f"A switch needs no value (--{switch}); --no-{switch} turns it off."]
    return "\n".join(lines)


def _lines(keys: list[Key], short: bool) -> list[str]:
    lines = []
    for key in keys:
        text = key.help.split(". ")[0].rstrip(".") + "." if short else key.help
        if key.default not in ("", None, [], {}, False):
            text += f" (default: {_shown(key.default)})"
        lines += _entry(f"--{key.name}{_placeholder(key)}", text)
    return lines


def _placeholder(key: Key) -> str:
    if key.is_switch:
        return ""
    if get_origin(key.type) is not None and (choices := _literal(key.type)):
        return " {" + ",".join(map(str, choices)) + "}"
    words = {int: "N", float: "X"}
    return f" {words.get(key.type, 'VALUES' if key.takes_several else 'NAME: VALUE' if key.is_mapping else 'TEXT')}"


def _literal(kind: Any) -> tuple[Any, ...]:
    found = get_args(kind)
    return found if all(isinstance(one, str | int) for one in found) else ()


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _width() -> int:
    return max(60, min(110, shutil.get_terminal_size().columns))


def _entry(flag: str, text: str) -> list[str]:
    indent = 34
    body = textwrap.wrap(text, _width() - indent) or [""]
    if len(flag) + 4 <= indent:
        return [f"  {flag:<{indent - 2}}{body[0]}", *(" " * indent + line for line in body[1:])]
    return [f"  {flag}", *(" " * indent + line for line in body)]
