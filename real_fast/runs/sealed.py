"""Folders that are there whole or not at all, with a checksum of every file in them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open

from real_fast.runs import fingerprints, logged
from real_fast.utils.jsonio import parse

CHECKSUMS = "checksums.json"
# What is read of a folder, where it is there: without a checksum it is not what was written.
_READ = ["model*.safetensors", "optimizer*.safetensors", "adapter_model.safetensors", "adapter_config.json"]
_READ += ["config.json", "tokenizer.json", "real_fast.json", "trainer_state.json", "ahead.json", logged.FILE]
_READ += ["model.safetensors.index.json", fingerprints.FILE]


@contextmanager
def writing_folder(target: Path) -> Iterator[Path]:
    """Give a folder to write to, which becomes `target` at the end, or is removed where something is raised.

    The checksums (SHA-256, about 1.5 GB a second and core) go into its checksums.json, by path.
    """
    temporary = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        publish(temporary, target, {})
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish(temporary: Path, target: Path, sums: Mapping[str, str]) -> None:
    """Give a folder its checksums.json and its name.

    Args:
        temporary: The folder, in which everything is.
        target: Its name from now on; what has that name is removed.
        sums: What :func:`seal` gave for some of its files, by path.
    """
    others = [path for path in _files(temporary) if path not in sums]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets other threads run
        all_sums = dict(sums) | dict(zip(others, pool.map(lambda path: seal(temporary / path), others), strict=True))
    text = json.dumps(dict(sorted(all_sums.items())), indent=1)
    (temporary / CHECKSUMS).write_text(text, encoding="utf-8")
    seal(temporary / CHECKSUMS)
    _to_disk(temporary)
    _replace(temporary, target)
    _to_disk(target.parent)


def seal(path: Path) -> str:
    """The checksum of a file, which has reached the disk when this returns."""
    with open(path, "rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
        os.fsync(handle.fileno())
    return found


def _to_disk(folder: Path) -> None:
    """Let the names in a folder reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damage(folder: Path, skip: str = "") -> str | None:
    """What is wrong with a folder that :func:`writing_folder` made, for people; None where nothing is.

    Files of other names that came later are not looked at, and neither are those whose names match the pattern `skip`.
    In a folder of an earlier version, without checksums, a safetensors file that is cut off is found, and a changed bit
    is not.
    """
    try:
        if not (folder / CHECKSUMS).exists():
            if (folder / fingerprints.FILE).exists():  # of a version that writes checksums
                return f"{CHECKSUMS} is missing"
            for file in folder.glob("*.safetensors"):
                with safe_open(file, framework="pt"):
                    pass
            return None
        all_sums: dict[str, str] = parse((folder / CHECKSUMS).read_text(encoding="utf-8"))
        want = {path: found for path, found in all_sums.items() if not fnmatch(path, skip)}
        if missing := sorted(path for path in want if not (folder / path).is_file()):
            return f"{', '.join(missing)} is missing"
        there = {path.name for pattern in _READ for path in folder.glob(pattern) if path.is_file()}
        if unknown := sorted(name for name in there - all_sums.keys() if not fnmatch(name, skip)):
            return f"{CHECKSUMS} does not name {', '.join(unknown)}"
        found = _checksums(folder, want)
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        return f"it cannot be read ({error})"
    changed = sorted(path for path in want if found[path] != want[path])
    return f"{', '.join(changed)} is not as it was written" if changed else None


def _files(folder: Path) -> list[str]:
    """Paths of all files but the checksums, relative to the folder."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [path for path in paths if path != CHECKSUMS]


def _checksums(folder: Path, paths: Iterable[str]) -> dict[str, str]:
    def of(path: str) -> str:
        with open(folder / path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets other threads run
        return dict(zip(paths, pool.map(of, paths), strict=True))


def _replace(temporary: Path, target: Path) -> None:
    """Rename; what was there goes out of the way first, and is removed when the new folder is in its place."""
    earlier = target.with_name(f"{target.name}.replaced.tmp")
    shutil.rmtree(earlier, ignore_errors=True)
    if target.exists():
        os.replace(target, earlier)
    try:
        os.replace(temporary, target)
    except OSError:
        if earlier.exists():
            os.replace(earlier, target)
        raise
    shutil.rmtree(earlier, ignore_errors=True)
