"""What a run writes of its model: checkpoints, and final/ as a normal Hugging Face folder."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from real_fast.config import Config
from real_fast.model.precision import dtype_of, resolve
from real_fast.runs import checkpoint
from real_fast.runs.checkpoint import TrainState
from real_fast.runs.folder import RunFolder
from real_fast.training.update import Updater


def judge_settings(config: Config) -> dict[str, Any]:
    """What a judge has to know of how it was trained; saved with its model as real_fast.json."""
    rollout = config.rollout
    return {
        "scale": asdict(config.scale),
        "prompt": asdict(config.prompt),
        "rollout": {"answer": rollout.answer, "max_tokens": rollout.max_tokens, "top_p": rollout.top_p},
        "objective": {"renormalize": config.objective.renormalize},
        "eval": {"protocol": config.eval.protocol},
    }


def save_checkpoint(folder: RunFolder, updater: Updater, state: TrainState, tokenizer: Any, config: Config) -> None:
    """Everything that the next step depends on; the main process writes it. Raises :class:`CheckpointError`."""
    if not updater.world.is_main:
        return
    checkpoint.save(
        folder.checkpoints,
        updater.policy.model,
        tokenizer,
        updater.optimizer,
        updater.scheduler,
        state,
        judge_settings(config),
        config.save.keep,
    )


def save_final(folder: RunFolder, updater: Updater, tokenizer: Any, config: Config) -> None:
    """The judge, in the precision that it was trained in. Raises :class:`CheckpointError`."""
    dtype = dtype_of(resolve(config.train.precision, updater.policy.model.device))
    checkpoint.save_model(updater.policy.model, tokenizer, folder.path / "final", judge_settings(config), dtype)
