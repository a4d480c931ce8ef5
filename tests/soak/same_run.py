"""Whether two runs left the same behind: everything but times, memory, and where they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from real_fast.runs import checkpoint, logged
from real_fast.runs.sealed import CHECKSUMS, damage

# What depends on the clock or the machine.
_APART = {"seconds", "tokens_per_second", "rollout_tokens_per_second", "peak_memory_gib", "machine", "step_time"}
# Of records that have times in them.
_APART |= {"sha256"}
# And what the call of the command says, in the files that keep it. Elsewhere, `id` and `output` are a row's.
_CALL = {"resume", "output", "folder", "id", "run_name"}
_HAVE_CALL = ("config.yaml", "trackers.json", "summary.json", "fingerprints.json")
# What a killed and resumed run may have beside: what it set aside.
_BESIDE = ("superseded", "tensorboard")
_PNG = b"\x89PNG\r\n\x1a\n"


def differences(want: Path, got: Path) -> list[str]:
    """What a run has otherwise than the undisturbed one; nothing for none. Both are folders of finished runs."""
    names, found_names = set(_files(want)), set(_files(got))
    found = [f"{name} is missing" for name in sorted(names - found_names)]
    found += [f"{name} is too much" for name in sorted(found_names - names)]
    for name in sorted(names & found_names):
        a, b = _content(want, name), _content(got, name)
        if a != b:
            found.append(f"{name} differs{_where(a, b)}")
    for folder in (got, got / "stage1"):
        if not folder.is_dir():
            continue
        found += [f"{path.relative_to(got)} is too much" for path in (folder / "checkpoints").glob("*.damaged*")]
        for sealed in (*checkpoint.complete(folder / "checkpoints"), folder / "final"):
            if problem := damage(sealed):
                found.append(f"{sealed.relative_to(got)}: {problem}")
            for name in logged.changed(folder, sealed / logged.FILE):
                found.append(f"{sealed.relative_to(got)}: {name} is not as {logged.FILE} there has it")
    return found


def _files(run: Path) -> Iterator[str]:
    for path in run.rglob("*"):
        name = path.relative_to(run).as_posix()
        if path.is_file() and not any(part in name for part in _BESIDE):
            yield name


def _content(run: Path, name: str) -> Any:
    """A file as far as it must be the same."""
    path = run / name
    if path.name == CHECKSUMS:  # of files with times in them; damage() compares
        return None
    if path.suffix == ".png":  # of curves of times too
        return path.read_bytes()[:8] == _PNG
    if path.suffix == ".html":  # the same
        return path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    if path.suffix not in (".json", ".jsonl", ".yaml"):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    text = path.read_text(encoding="utf-8").replace(str(run), "RUN")
    if path.name == logged.FILE:  # checksums of what has times in it; differences() compares
        return [dict.fromkeys(json.loads(text))]
    apart = _APART | _CALL if path.name in _HAVE_CALL else _APART
    try:
        values = (
            [yaml.safe_load(text)] if path.suffix == ".yaml"
            else [json.loads(line) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]
        )  # fmt: skip
    except (ValueError, yaml.YAMLError) as error:
        return f"cannot be read: {error}"
    return [_plain(value, apart) for value in values]


def _plain(value: Any, apart: set[str]) -> Any:
    if isinstance(value, dict):
        return {
            key: _plain(one, apart) for key, one in value.items()
            if key not in apart and not key.startswith(("time/", "memory/"))
        }  # fmt: skip
    return [_plain(one, apart) for one in value] if isinstance(value, list) else value


def _where(a: Any, b: Any) -> str:
    """The first place in which two JSON files differ, for whoever looks for the cause."""
    if not isinstance(a, list) or not isinstance(b, list):
        return ""
    if len(a) != len(b):
        return f" ({len(b)} lines in place of {len(a)})"
    place = next(number for number, (one, other) in enumerate(zip(a, b, strict=True)) if one != other)
    a, b = a[place], b[place]
    if not isinstance(a, dict) or not isinstance(b, dict):
        return f" (line {place + 1})"
    return f" (line {place + 1}: {', '.join(sorted(k for k in a | b if a.get(k) != b.get(k)))})"
