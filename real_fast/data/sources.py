"""Where rows come from, as the settings say it: files, patterns, datasets on the hub, several of them, named ones."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePath
from typing import Any

from real_fast.errors import DataError

# What the setting `data.train` (and a benchmark of `data.eval`) can be: a source, a source with settings of its own
# ({path: owner/name, split: test}), or several of these, which are read one after another.
Setting = str | Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True)
class Source:
    """One file, dataset on the hub, or built-in generator.

    Attributes:
        path: A file, "owner/name" on the Hugging Face hub, "synthetic:train" or "synthetic:eval".
        split: Split of a hub dataset.
        config: Configuration ("subset") of a hub dataset; empty for its only one.
        revision: Branch, tag or commit of a hub dataset; empty for the newest.
        fields: Names of ours that are other names in the records.
    """

    path: str
    split: str = ""
    config: str = ""
    revision: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)


def sources(setting: Setting, default: Source) -> list[Source]:
    """The single sources of a setting, patterns (``*``, ``?``, ``[...]``, ``**``) expanded in the order of the names.

    Args:
        setting: See :data:`Setting`.
        default: What a source does not say itself.

    Raises:
        DataError: A pattern that no file matches, or a setting that is none.
    """
    if isinstance(setting, str | PurePath):
        text = str(setting)
        path = Path(text).expanduser()
        if not glob.has_magic(text) or path.exists() or text.startswith("synthetic:"):
            return [replace(default, path=text)]
        found = sorted(p for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not found:
            raise DataError(f"{text}: no file matches (looked in {Path.cwd()})")
        return [replace(default, path=p) for p in found]
    if isinstance(setting, Mapping):
        known = [f.name for f in fields(Source)]
        if unknown := sorted(set(map(str, setting)) - set(known)):
            raise DataError(f"a source has {unknown[0]!r}: it has {', '.join(known)}")
        if not isinstance(setting.get("path"), str) or not setting["path"]:
            raise DataError(f"a source has no path: {dict(setting)}")
        own = {k: v for k, v in setting.items() if k != "path" and v is not None}
        return sources(setting["path"], replace(default, **own))
    if isinstance(setting, Sequence) and setting:
        return [source for one in setting for source in sources(one, default)]
    raise DataError(f"{setting!r} names no source: give a file, a dataset on the hub, or a list of them")


def benchmarks(setting: Setting) -> dict[str, Setting]:
    """The benchmarks of ``data.eval``: {"": source} for a single one, which needs no name.

    A mapping gives the names; those of a list are the files' (without folder and ending).

    Raises:
        DataError: Two of one name, or a name that no file can have.
    """
    if isinstance(setting, str | PurePath) or (isinstance(setting, Mapping) and "path" in setting):
        return {"": setting}
    named: dict[str, Setting] = {}
    pairs = setting.items() if isinstance(setting, Mapping) else [(short_name(one), one) for one in setting]
    for name, source in pairs:
        name = str(name)
        if not name.strip() or "/" in name or name in named:
            what = "stands there twice" if name in named else "is no name"
            raise DataError(
                f"data.eval: {name!r} {what}: name the benchmarks, as in {{mt_bench: a.jsonl, flask: b.jsonl}}"
            )
        named[name] = source
    if not named:
        raise DataError("data.eval names no benchmark")
    return named


def short_name(setting: Setting) -> str:
    """A name for a source: its file's, without folder and endings; the dataset's on the hub."""
    if isinstance(setting, Mapping):
        return short_name(str(setting.get("path", "")))
    if not isinstance(setting, str | PurePath):
        raise DataError(
            f"data.eval: {setting!r} needs a name: name the benchmarks, as in {{mt_bench: [a.jsonl, b.jsonl]}}"
        )
    name = Path(str(setting)).name
    return name.split(".")[0] or name


def describe(setting: Setting) -> str:
    """A setting in words, for messages."""
    if isinstance(setting, str | PurePath):
        return str(setting)
    if isinstance(setting, Mapping):
        if "path" in setting:
            return str(setting["path"])
        return ", ".join(f"{name}: {describe(one)}" for name, one in setting.items())
    return ", ".join(map(describe, setting))
