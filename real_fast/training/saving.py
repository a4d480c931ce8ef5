"""What a run writes of its model: checkpoints, and final/ as a normal Hugging Face folder, or one of adapters."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from real_fast.config import Config
from real_fast.errors import CheckpointError, ElsewhereError, raised_by_all
from real_fast.model.precision import dtype_of, resolve
from real_fast.model.write import contents_of
from real_fast.runs import checkpoint, fingerprints, logged
from real_fast.runs.checkpoint import TrainState
from real_fast.runs.fingerprints import Fingerprints
from real_fast.runs.folder import RunFolder
from real_fast.runs.stop import Stopped
from real_fast.runs.writer import FolderWriter
from real_fast.training.update import Updater

logger = logging.getLogger(__name__)


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
    """Writes into a run's folder, with all ranks. As a context, it ends when everything is written.

    Args:
        folder: The run's.
        updater: Has the model, its optimiser and the schedule.
        tokenizer: The model's.
        config: The settings.
        template: Text of the prompt's template as the run uses it; its file may change meanwhile.
        identity: Go with every checkpoint.

    Attributes:
        newest: Updates in the newest checkpoint; None before the first.
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
        self.newest: int | None = None
        self.writer = FolderWriter(updater.world, config.save.background, updater.policy.model.device)

    def checkpoint(self, state: TrainState, files: Mapping[str, str]) -> None:
        """Everything that the next step depends on, as it is now; it may be written while training goes on.

        Args:
            state: Where the run is.
            files: Further files, by their names.

        Raises:
            CheckpointError: This one could not be written, or the one before (ElsewhereError where another rank says).
        """
        u, model = self.updater, self.updater.policy.model
        texts = {**self.texts, **files, fingerprints.FILE: self.identity.text()}
        with u.world.together():  # the others do not wait for a main rank that fails
            if u.world.is_main:  # which writes them
                texts[logged.FILE] = logged.text_of(self.folder.path)
        checkpoint.save(
            self.folder.checkpoints,
            self.writer,
            contents_of(model, self.tokenizer, texts, model.dtype),
            model,
            u.optimizer,
            u.scheduler,
            state,
            self.config.save.keep,
        )
        self.newest = state.step

    def keep(self, error: Exception, state: TrainState, files: Callable[[], Mapping[str, str]]) -> None:
        """An error ends the run between two updates: before that, write a checkpoint of those that none has yet.

        Nothing before the run's first checkpoint, and nothing where some ranks go on: writing takes all of them. What
        goes wrong here is said, and the error stays the one that ends the run.

        Args:
            error: What ends the run.
            state: Where it is.
            files: As of :meth:`checkpoint`; asked for where one is written.
        """
        if self.newest is None or self.newest == state.step:
            return
        if self.updater.world.size > 1 and not raised_by_all(error):
            return
        try:
            self.checkpoint(state, files())
            self.writer.wait()
        except (CheckpointError, ElsewhereError, OSError) as problem:
            logger.error("%s", problem)

    def final(self) -> None:
        """The judge, in the precision that it was trained in, or its adapters. Raises as :meth:`checkpoint` does."""
        model, merge = self.updater.policy.model, self.config.save.merge
        dtype = dtype_of(resolve(self.config.train.precision, self.updater.policy.device))
        if merge:
            adapters = contents_of(model, self.tokenizer, self.texts, dtype)
            checkpoint.save_model(self.writer, self.folder.path / "adapter", adapters)
        contents = contents_of(model, self.tokenizer, self.texts, dtype, merge)
        checkpoint.save_model(self.writer, self.folder.path / "final", contents)
        self.writer.wait()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is being written. Raises :class:`CheckpointError`, unless something else went wrong before."""
        try:
            self.writer.wait()
        except (CheckpointError, ElsewhereError) as problem:
            if kind is None or issubclass(kind, Stopped):
                raise
            logger.error("%s", problem)
