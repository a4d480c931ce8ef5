"""Hostile files where settings, a run and a model are read: a value, None, or an error for people."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from real_fast.config import Config, DataConfig, cli
from real_fast.errors import UserError
from real_fast.model.folder import check_folder, read_json, weight_files, weight_names
from real_fast.model.judge_settings import trained_settings
from real_fast.runs import checkpoint, fingerprints
from real_fast.runs.folder import RunFolder, settings_in
from real_fast.runs.lock import _owner
from real_fast.runs.sealed import damage
from real_fast.runs.trackers import Trackers


def config(folder: Path, data: bytes) -> None:
    """A file of settings: they can be checked and written, or an error names the file."""
    path = folder / "settings.yaml"
    path.write_bytes(data)
    try:
        settings = cli.load(path)
    except UserError as error:
        assert path.name in str(error), f"the file is not named: {error}"
        return
    try:
        settings.validate()
    except UserError as error:
        assert str(error)
        return
    cli.dump(settings, folder / "written.yaml")
    assert cli.load(folder / "written.yaml") == settings, "settings are not read as they are written"


def _config(folder: Path) -> Config:
    return Config(model="m", output=str(folder), resume=True, data=DataConfig(train="t"))


def _metrics(folder: Path) -> None:
    run = RunFolder(_config(folder))
    run.rewind(1)
    json.dumps(run.metrics())


def _state(folder: Path) -> None:
    found = checkpoint.newest(folder)
    if found is not None:
        state = checkpoint._read_state(found)
        assert state.step + state.rows_seen + state.skipped_steps >= 0 and dict(state.scheduler) is not None


# The file that a target's first byte chooses, by its path, and what reads it in its folder.
READ: dict[str, Callable[[Path], object]] = {
    "metrics.jsonl": _metrics,
    "rollouts.jsonl": _metrics,
    "config.yaml": settings_in,
    "step-000001/trainer_state.json": _state,
    "fingerprints.json": fingerprints.read,
    "checksums.json": damage,
    "trackers.json": lambda folder: Trackers(_config(folder), RunFolder(_config(folder)), 1),
    "eval/step-1.json": lambda folder: RunFolder(_config(folder)).evaluation("step-1"),
    "model.safetensors.index.json": weight_files,
    "model.safetensors": weight_names,
    "config.json": check_folder,
    "real_fast.json": lambda folder: trained_settings(str(folder)),
    "generation_config.json": lambda folder: read_json(folder / "generation_config.json"),
    "summary.json": lambda folder: RunFolder(_config(folder)).claim(_config(folder)),
    ".run.lock": lambda folder: _owner(folder / ".run.lock"),
}


def resume(folder: Path, data: bytes) -> None:
    """A file of a run or of a model, the first byte saying which."""
    name, read = list(READ.items())[data[0] % len(READ) if data else 0]
    place = folder / "run"
    shutil.rmtree(place, ignore_errors=True)
    file = place / name
    file.parent.mkdir(parents=True)
    file.write_bytes(data[1:])
    if name == "summary.json":
        (place / "config.yaml").write_text("{}")
    if name != "metrics.jsonl" and read is not check_folder:
        (place / "metrics.jsonl").write_text('{"step": 1, "phase": "train"}\n')
    logger = logging.getLogger("real_fast")
    level = logger.level
    logger.setLevel("ERROR")  # of what is damaged, a warning tells
    try:
        read(place)
    except UserError as error:
        str(error).encode()
    finally:
        logger.setLevel(level)
