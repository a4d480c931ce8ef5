"""A YAML file of settings, with the line of every name; what cannot be read is one line with the file and its line."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from real_fast.errors import ConfigError

_MOST = 10_000  # values of a file of settings
_PACKAGE = Path(__file__).resolve().parents[1]


def folder_of_configs() -> Path:
    """The configurations that come with the package: inside it in a wheel, beside it in a checkout."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def find(name: str | Path) -> Path:
    """The file of a ``--config``: a path, or the name of one that comes with the package, e.g. "quickstart" or
    "paper/qwen3-8b-real".

    Raises:
        ConfigError: There is none, or it is a folder.
    """
    path, known = Path(name).expanduser(), folder_of_configs()
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(f"config {name} is a folder: give a YAML file")
    stem = path.name.removesuffix(".yaml").removesuffix(".yml")
    for folder in (Path("."), Path("paper")):
        if path.parent in (folder, "configs" / folder) and (known / folder / f"{stem}.yaml").is_file():
            return known / folder / f"{stem}.yaml"
    names = sorted(file.stem for file in known.glob("*.yaml"))
    close = get_close_matches(stem, names, n=1)
    raise ConfigError(
        f"config {name}: there is no such file"
        + (f"; did you mean {close[0]}? " if close else ". ")
        + f"With the package come {', '.join(names)}"
    )


def read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Read a file.

    Returns:
        Its values, and the line of every name, written with dots ("rollout.max_tokens").

    Raises:
        ConfigError: It cannot be read, is no YAML, names something twice, or is no mapping of names to values.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        loader = yaml.SafeLoader(text)
    except OSError as error:
        raise ConfigError(f"config {path}: cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config {path}: this is no text in UTF-8, so no YAML") from error
    lines: dict[str, int] = {}
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, lines
        if not isinstance(node, yaml.MappingNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
            raise ConfigError(f"{path}:{_line(node)}: this is {kind}: a file of settings has lines such as model: NAME")
        if _written_out(node, {}) > _MOST:
            raise ConfigError(f"{path}: written out, its aliases make more than {_MOST} values: leave them out")
        _note_lines(node, "", path, lines)
        return loader.construct_document(node), lines
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{at}: {_problem(error, text, mark)}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        raise ConfigError(f"config {path}: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"config {path}: nested too deep for settings") from error
    finally:
        loader.dispose()


def _problem(error: yaml.MarkedYAMLError, text: str, mark: Any) -> str:
    said = " ".join((error.problem or str(error)).split())
    lines = text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())] or "'\\t'" in said:
        return "a tab stands here: YAML wants spaces"
    if "could not determine a constructor for the tag" in said:
        return f"{said.split()[-1]} is a tag that settings do not have: leave it out"
    return f"this is no YAML: {said}"


def _note_lines(
    node: yaml.MappingNode, prefix: str, path: Path, lines: dict[str, int], outer: tuple[yaml.Node, ...] = ()
) -> None:
    """Write down the line of every name in a mapping and those in it, and refuse a name that comes twice."""
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{path}:{_line(key)}: a name is expected here, in front of a colon")
        name = prefix + key.value
        if name in lines:
            raise ConfigError(f"{path}:{_line(key)}: {name} is given twice, first in line {lines[name]}: remove one")
        if value is node or value in outer:
            raise ConfigError(f"{path}:{_line(key)}: {name} refers to what it stands in")
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        lines[name] = _line(key)
        if isinstance(value, yaml.MappingNode):
            _note_lines(value, f"{name}.", path, lines, (*outer, node))


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, where every alias is as many as what it refers to."""
    if id(node) not in known:
        known[id(node)] = 1  # of one that holds itself, which is refused by its name
        inner = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value
        if not isinstance(node, yaml.ScalarNode):
            known[id(node)] += sum(_written_out(one, known) for one in inner)
    return known[id(node)]


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
