"""Checkpoints: written under a temporary name, renamed when complete, safetensors and JSON alone."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from real_fast.errors import CheckpointError
from real_fast.runs.progress import no_foreign_bars

_STATE = "trainer_state.json"
_OPTIMIZER = "optimizer.safetensors"
_TENSORS = "model.safetensors"


@dataclass
class TrainState:
    """Where a run is. A checkpoint says everything that the next step depends on.

    Attributes:
        step: REAL updates done.
        rows_seen: Training rows used up, which is the data's position.
        skipped_steps: Optimiser steps left out because the gradient was not finite.
        num_tokens: Tokens of the sequences trained on so far, prompts included.
        sampled_tokens: Tokens sampled so far.
        seconds: Time by phase so far.
        scheduler: State of the learning rate's schedule.
    """

    step: int = 0
    rows_seen: int = 0
    skipped_steps: int = 0
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


def save_model(model: PreTrainedModel, tokenizer: Any, target: Path, extra: dict[str, Any], dtype: torch.dtype) -> None:
    """Write a normal Hugging Face folder, atomically.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        target: Folder to make or replace.
        extra: Written as real_fast.json: scale, prompt and protocol that the judge was trained with.
        dtype: Dtype of the weights on disk.
    """
    temporary = _temporary(target)
    try:
        _empty(temporary)
        _write_model(model, tokenizer, temporary, extra, dtype)
        _publish(temporary, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{target} could not be written: {error}. Earlier checkpoints are untouched") from error


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: LambdaLR,
    state: TrainState,
    extra: dict[str, Any],
    keep: int,
) -> Path:
    """Write ``folder/step-NNNNNN`` and remove the oldest beyond `keep`.

    Raises:
        CheckpointError: The disk is full or read-only; the half-written folder is removed, earlier ones stay.
    """
    target = folder / f"step-{state.step:06d}"
    temporary = _temporary(target)
    try:
        _empty(temporary)
        _write_model(model, tokenizer, temporary, extra, model.dtype)
        save_file(_optimizer_tensors(model, optimizer), temporary / _OPTIMIZER)
        state.scheduler = {"last_epoch": scheduler.last_epoch}
        (temporary / _STATE).write_text(json.dumps(asdict(state), indent=2, allow_nan=False), encoding="utf-8")
        _publish(temporary, target)
    except (OSError, SafetensorError) as error:  # the latter on a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {target} could not be written: {error}. Earlier checkpoints are untouched: free space or "
            "repair the disk, then go on with --resume"
        ) from error
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def save_tensors(target: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors into a folder of their own, atomically. Raises :class:`CheckpointError`."""
    temporary = _temporary(target)
    try:
        _empty(temporary)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary / _TENSORS)
        _publish(temporary, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{target} could not be written: {error}. Free space or repair the disk") from error


def load_tensors(folder: Path) -> dict[str, torch.Tensor] | None:
    """What :func:`save_tensors` wrote, or None where there is no such folder. Raises :class:`CheckpointError`."""
    if not (folder / _TENSORS).is_file():
        return None
    try:
        return load_file(folder / _TENSORS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / _TENSORS} cannot be read: {error}") from error


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; a half-written one has a temporary name and is ignored."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and ".tmp" not in p.name and (p / _STATE).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def load(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> TrainState:
    """Restore optimiser, schedule and random states, and return the rest; weights come with the model itself.

    Args:
        path: A complete checkpoint, from which `model` was loaded.
        model: The model, for its parameters' names.
        optimizer: A fresh optimiser of the same model.
        scheduler: A fresh schedule.

    Raises:
        CheckpointError: A checkpoint of another model.
    """
    state = TrainState(**json.loads((path / _STATE).read_text(encoding="utf-8")))
    tensors = load_file(path / _OPTIMIZER)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        moments = {key: tensors.get(f"{name}:{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
        if moments["exp_avg"] is None:
            if state.scheduler["last_epoch"] > state.skipped_steps:  # both count optimiser steps
                raise CheckpointError(
                    f"checkpoint {path} has no optimiser state for {name}: it belongs to another model"
                )
            continue
        optimizer.state[parameter] = {
            key: value.to(parameter.device) for key, value in moments.items() if value is not None
        }
    # The place in the schedule comes from the checkpoint, the schedule from the settings, which may have changed.
    scheduler.last_epoch = state.scheduler["last_epoch"]
    rates = [
        lr * shape(scheduler.last_epoch) for lr, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    scheduler._last_lr = rates
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    torch.set_rng_state(tensors["rng:cpu"])
    if "rng:cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng:cuda"])
    return state


def _optimizer_tensors(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {"rng:cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng:cuda"] = torch.cuda.get_rng_state()
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}:{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def _write_model(
    model: PreTrainedModel, tokenizer: Any, folder: Path, extra: dict[str, Any], dtype: torch.dtype
) -> None:
    if dtype != model.dtype:
        # A copy of the tensors, not of the module: training goes on in float32. A tied head is listed once.
        tensors = [*model.named_parameters(), *((k, v) for k, v in model.named_buffers() if k in model.state_dict())]
        state = {k: v.detach().to(dtype) if v.is_floating_point() else v for k, v in tensors}
        with no_foreign_bars():
            model.save_pretrained(folder, state_dict=state)
        # save_pretrained() writes the module's dtype, and the tensors on disk have another.
        config = folder / "config.json"
        text = json.loads(config.read_text(encoding="utf-8")) | {"dtype": str(dtype).removeprefix("torch.")}
        config.write_text(json.dumps(text, indent=2), encoding="utf-8")
    else:
        with no_foreign_bars():
            model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    template = Path(extra.get("prompt", {}).get("template", ""))
    if template.suffix:  # a template of the user's goes with the model, so that the folder can be moved
        shutil.copyfile(template.expanduser(), folder / template.name)
        extra = extra | {"prompt": extra["prompt"] | {"template": template.name}}
    (folder / "real_fast.json").write_text(json.dumps(extra, indent=2, allow_nan=False), encoding="utf-8")


def _temporary(target: Path) -> Path:
    return target.with_name(f"{target.name}.tmp")


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(temporary: Path, target: Path) -> None:
    for file in temporary.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)
