"""Checkpoints: written under a temporary name, renamed when complete, with checksums; safetensors and JSON alone."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from real_fast.distributed.slices import TensorFiles
from real_fast.distributed.world import ALONE, World
from real_fast.errors import CheckpointError
from real_fast.runs import optimizer_state, random_state
from real_fast.runs.parts import Contents, Part, files_in
from real_fast.runs.sealed import damage
from real_fast.runs.writer import FolderWriter
from real_fast.utils.files import free_name
from real_fast.utils.jsonio import parse

logger = logging.getLogger(__name__)
_STATE = "trainer_state.json"
OPTIMIZER = "optimizer"
_TENSORS = "model"
_DAMAGED = ".damaged"


@dataclass
class TrainState:
    """Where a run is. A checkpoint says everything that the next step depends on.

    Attributes:
        step: REAL updates done.
        rows_seen: Training rows used up, which is the data's position.
        skipped_steps: Optimiser steps left out because the gradient was not finite.
        idle_updates: The last so many updates (or steps of the warm-up) in a row trained nothing.
        num_tokens: Tokens of the sequences trained on so far, prompts included.
        sampled_tokens: Tokens sampled so far.
        seconds: Time by phase so far.
        scheduler: State of the learning rate's schedule.
    """

    step: int = 0
    rows_seen: int = 0
    skipped_steps: int = 0
    idle_updates: int = 0
    num_tokens: int = 0
    sampled_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)

    def advance(self, rows: int, num_tokens: int, sampled_tokens: int) -> None:
        """An update is done."""
        self.step += 1
        self.rows_seen += rows
        self.num_tokens += num_tokens
        self.sampled_tokens += sampled_tokens


def save_model(writer: FolderWriter, target: Path, contents: Contents) -> None:
    """Write a model's folder, atomically.

    Args:
        writer: Writes it, with all ranks.
        target: Folder to make or replace.
        contents: The model's.

    Raises:
        CheckpointError: The disk is full or read-only (see :meth:`FolderWriter.write`).
    """
    writer.write(
        target, contents, lambda: "free space or repair the disk; checkpoints are untouched: go on with --resume"
    )


def save(
    folder: Path,
    writer: FolderWriter,
    contents: Contents,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR,
    state: TrainState,
    keep: int,
) -> Path:
    """Write ``folder/step-NNNNNN`` and remove the oldest beyond `keep`, while training goes on or not.

    All of it is as it is now, whatever training changes while it is written. A checkpoint does not depend on the number
    of ranks: tensors are whole, and each is in one file.

    Args:
        folder: Of the run's checkpoints.
        writer: Writes it, with all ranks; :meth:`FolderWriter.wait` returns when it is there.
        contents: The weights that are trained, and what goes with them.
        model: The model, for its parameters' names.
        optimizer: Its optimiser.
        scheduler: The optimiser's schedule.
        state: Where the run is.
        keep: Checkpoints that stay; of updates in a row that trained nothing, the newest stays beside them.

    Raises:
        CheckpointError: The disk is full or read-only; the half-written folder is removed, earlier ones stay.
    """
    target = folder / f"step-{state.step:06d}"
    state.scheduler = {"last_epoch": scheduler.last_epoch}
    text = json.dumps(asdict(state), indent=2, allow_nan=False)

    def small(temporary: Path) -> None:
        contents.small(temporary)
        (temporary / _STATE).write_text(text, encoding="utf-8")

    trained_last = state.step - state.idle_updates

    def rotate() -> None:
        # Updates behind a step that broke the weights are skipped: theirs do not push out those from before.
        trained = [path for path in complete(folder) if step_of(path) <= trained_last]
        idle = [path for path in complete(folder) if step_of(path) > trained_last]
        for old in [*trained[:-keep], *idle[:-1]]:
            _remove(old)

    moments = Part(
        OPTIMIZER,
        chain(random_state.tensors_of(writer.world), optimizer_state.tensors_of(model, optimizer, writer.world)),
        optimizer_state.local_bytes(optimizer),
        metadata=optimizer_state.metadata(optimizer),
    )
    writer.write(
        target,
        Contents(small, [*contents.parts, moments]),
        lambda: "repair the disk or free space; " + kept(folder),
        rotate,
    )
    return target


def save_tensors(target: Path, tensors: Iterable[tuple[str, torch.Tensor]], world: World = ALONE) -> None:
    """Write tensors into a folder of their own, atomically, and wait for it.

    Args:
        target: Folder to make or replace.
        tensors: Names and tensors; all ranks go through them together, each writes its share.
        world: The ranks.

    Raises:
        CheckpointError: The disk is full or read-only (see :meth:`FolderWriter.write`).
    """
    writer = FolderWriter(world, "never")
    part = Part(_TENSORS, tensors, nbytes=0)
    writer.write(target, Contents(lambda _: None, [part]), lambda: "free space or repair the disk")


def open_tensors(folder: Path, check: bool = True) -> TensorFiles | None:
    """What :func:`save_tensors` wrote, or None where there is no such folder. Raises :class:`CheckpointError`.

    `check` is whether to compare checksums, for which all of it is read.
    """
    if not folder.is_dir():
        return None
    files = files_in(folder, _TENSORS)
    wrong = damage(folder) if check or not files else None
    if wrong or not files:
        wrong = wrong or f"it holds no {_TENSORS}.safetensors"
        raise CheckpointError(
            f"{folder} is damaged: {wrong}: bring it back from a copy, or start over with --overwrite, which moves the "
            "run aside"
        )
    return TensorFiles(files)


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. A half-written one has another name, and so has anything of the user's."""
    return [path for path in _numbered(folder) if (path / _STATE).is_file()]


def step_of(path: Path) -> int:
    """Updates done, of a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written; every file is read for that. None where there is no checkpoint.

    A newer one that is damaged is passed over, with a warning that names it.

    Raises:
        CheckpointError: All are damaged.
    """
    checkpoints = _numbered(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path not in checkpoints and not path.name.endswith((".tmp", _DAMAGED)):
            logger.warning("%s is not a checkpoint's name: it is left alone", path)
    wrong: dict[str, str] = {}
    for path in reversed(checkpoints):
        problem = damage(path) or _state_problem(path)
        if problem is None:
            if wrong:
                named = "; ".join(f"{name}: {text}" for name, text in wrong.items())
                logger.warning("going on from %s, since what is newer is damaged (%s)", path.name, named)
            return path
        wrong[path.name] = problem
    if wrong:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged ({'; '.join(f'{k}: {v}' for k, v in wrong.items())}): bring one "
            "back from a copy, or start over with --overwrite, which moves the run aside"
        )
    return None


def tidy(folder: Path, resumed_step: int) -> None:
    """Before a run goes on: what is newer than its checkpoint is damaged and gets a name that says so."""
    for path in _numbered(folder):
        if step_of(path) > resumed_step:
            os.replace(path, free_name(path.with_name(path.name + _DAMAGED)))
    for half_written in folder.glob("step-*.tmp"):
        shutil.rmtree(half_written, ignore_errors=True)


def kept(folder: Path) -> str:
    """What there is to go on from, for people."""
    found = complete(folder)
    return f"{found[-1].name} is kept: go on with --resume" if found else "no checkpoint yet: --resume starts over"


def load(
    path: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR,
    world: World = ALONE,
) -> TrainState:
    """Restore optimiser, schedule and random states, and return the rest; weights come with the model itself.

    Args:
        path: A complete checkpoint, of any number of ranks, from which `model` was loaded.
        model: The model, for its parameters' names; of sharded ones, this rank's part is read.
        optimizer: A fresh optimiser of the same model.
        scheduler: A fresh schedule.
        world: The ranks.

    Raises:
        CheckpointError: A checkpoint of another model.
    """
    state = _read_state(path)
    files = TensorFiles(files_in(path, OPTIMIZER))
    try:
        missing = optimizer_state.restore(model, optimizer, files)
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {path} has another optimiser's state ({error}): resume with the optim.name that it was made "
            "with, or start over from its weights with --init_from"
        ) from error
    # Both count optimiser steps; the schedule had those that were skipped, too, in earlier versions.
    if missing and state.scheduler["last_epoch"] not in (0, state.skipped_steps):
        raise CheckpointError(f"checkpoint {path} has no optimiser state for {missing[0]}: it belongs to another model")
    # The place in the schedule comes from the checkpoint, the schedule from the settings, which may have changed.
    scheduler.last_epoch = state.scheduler["last_epoch"]
    rates = [
        lr * shape(scheduler.last_epoch) for lr, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    scheduler._last_lr = rates
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    random_state.restore(files, world)
    return state


def _remove(old: Path) -> None:
    """Remove a checkpoint; half of one has no checkpoint's name. A disk that refuses costs room, and not the run."""
    half = old.with_name(f"{old.name}.old.tmp")
    shutil.rmtree(half, ignore_errors=True)
    try:
        os.replace(old, half)
        shutil.rmtree(half)
    except OSError as error:
        left = half if half.is_dir() else old
        logger.warning("%s could not be removed (%s) and takes room: remove it yourself", left, error.strerror)


def _read_state(path: Path) -> TrainState:
    """Raises OSError, ValueError or TypeError."""
    state = TrainState(**parse((path / _STATE).read_text(encoding="utf-8")))
    for name, usual in vars(TrainState()).items():
        if type(getattr(state, name)) is not type(usual):
            raise TypeError(f"{name} is {str(getattr(state, name))[:40]!r}")
    return state


def _state_problem(path: Path) -> str | None:
    try:
        _read_state(path)
    except (OSError, ValueError, TypeError) as error:
        return f"{_STATE} cannot be read ({error})"
    return None


def _numbered(folder: Path) -> list[Path]:
    """Folders with a checkpoint's name, oldest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-[0-9]{6,}", p.name) and p.is_dir()]
    return sorted(found, key=step_of)
