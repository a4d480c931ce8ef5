"""What a run writes of its model: checkpoints, and final/ as a normal Hugging Face folder, or one of adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from real_fast.config import Config
from real_fast.model.precision import dtype_of, resolve
from real_fast.model.write import write_model
from real_fast.runs import checkpoint, fingerprints
from real_fast.runs.checkpoint import TrainState
from real_fast.runs.fingerprints import Fingerprints
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


class Saver:
    """Writes into a run's folder; the main process alone does.

    Args:
        folder: The run's.
        updater: Has the model, its optimiser and the schedule.
        tokenizer: The model's.
        config: The settings.
        template: Text of the prompt's template as the run uses it; its file may change meanwhile.
        identity: Go with every checkpoint.
    """

    def __init__(
        self,
        folder: RunFolder,
        updater: Updater,
        tokenizer: Any,
        config: Config,
        template: str,
        identity: Fingerprints,
    ) -> None:
        self.folder, self.updater, self.tokenizer, self.config = folder, updater, tokenizer, config
        settings = judge_settings(config)
        self.texts: dict[str, str] = {}
        if suffix := Path(config.prompt.template).suffix:  # the user's own goes with the model, so that it can be moved
            name = f"judge_template{suffix}"  # not its own name, which may be that of the chat template's file
            settings["prompt"]["template"] = name
            self.texts[name] = template
        self.texts["real_fast.json"] = json.dumps(settings, indent=2, allow_nan=False)
        self.identity = identity

    def checkpoint(self, state: TrainState, files: Mapping[str, str]) -> None:
        """Everything that the next step depends on, `files` by name among it. Raises :class:`CheckpointError`."""
        u, model = self.updater, self.updater.policy.model
        if u.world.size > 1:
            return
        texts = {**self.texts, **files, fingerprints.FILE: self.identity.text()}
        checkpoint.save(
            self.folder.checkpoints,
            partial(write_model, model, self.tokenizer, texts=texts, dtype=model.dtype),
            model,
            u.optimizer,
            u.scheduler,
            state,
            self.config.save.keep,
        )

    def final(self) -> None:
        """The judge, in the precision that it was trained in, or its adapters. Raises :class:`CheckpointError`."""
        model, merge = self.updater.policy.model, self.config.save.merge
        if self.updater.world.size > 1:
            return
        dtype = dtype_of(resolve(self.config.train.precision, self.updater.policy.device))
        write = partial(write_model, model, self.tokenizer, texts=self.texts, dtype=dtype)
        if merge:
            checkpoint.save_model(self.folder.path / "adapter", write)
        checkpoint.save_model(self.folder.path / "final", partial(write, merge=merge))
