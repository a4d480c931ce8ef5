"""The rollouts of the next update, sampled in a thread while the present one trains, and kept with a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_fast.errors import CheckpointError
from real_fast.types import Group, Rollout

logger = logging.getLogger(__name__)
FILE = "ahead.json"


@dataclass(frozen=True)
class Sampled:
    """The groups of one update.

    Attributes:
        step: Updates before that one.
        groups: Its groups.
        seconds: How long sampling them took.
    """

    step: int
    groups: list[Group]
    seconds: float


class Ahead:
    """At most one batch of rollouts, on its way or ready."""

    def __init__(self) -> None:
        self._batch: Future[Sampled] | None = None

    def launch(self, step: int, sample: Callable[[], list[Group]]) -> None:
        """Begin with the groups of the update behind `step` others; there must be no batch that was not taken."""
        assert self._batch is None
        batch: Future[Sampled] = Future()

        def work() -> None:
            started = time.perf_counter()
            try:
                batch.set_result(Sampled(step, sample(), time.perf_counter() - started))
            except BaseException as error:  # it is the trainer's, and is raised where that waits for the batch
                batch.set_exception(error)

        self._batch = batch
        # A daemon, so that a second Ctrl-C need not wait for it.
        threading.Thread(target=work, name="rollouts", daemon=True).start()

    def join(self) -> None:
        """Wait until the engine is free; a batch that is ready stays. Raises whatever sampling raised, once."""
        if self._batch is not None:
            try:
                self._batch.result()
            except BaseException:
                if self._batch.done():  # and not a signal that came while it was waited for
                    self._batch = None
                raise

    def take(self, step: int) -> Sampled | None:
        """The groups of the update behind `step` others, or None where none were sampled. Raises as :meth:`join`."""
        self.join()
        batch, self._batch = self._batch, None
        found = batch.result() if batch is not None else None
        return found if found is not None and found.step == step else None

    def files(self) -> dict[str, str]:
        """What a checkpoint keeps, by the file's name; waits for the batch.

        Nothing where there is no batch or sampling failed: the checkpoint is still one to go on from, and the error is
        raised where the batch is next asked for.
        """
        if self._batch is None:
            return {}
        wait([self._batch])
        if self._batch.exception() is not None:
            return {}
        batch = self._batch.result()
        groups = [_plain(dataclasses.asdict(group)) for group in batch.groups]
        return {FILE: json.dumps({"step": batch.step, "seconds": batch.seconds, "groups": groups}, allow_nan=False)}

    def restore(self, checkpoint: Path) -> None:
        """Take over what a checkpoint kept, if anything.

        Raises:
            CheckpointError: A file that cannot be read, in a checkpoint without checksums.
        """
        file = checkpoint / FILE
        if not file.is_file():
            return
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            batch = Sampled(kept["step"], [_group(**group) for group in kept["groups"]], kept["seconds"])
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({error}): remove it, and its rollouts are sampled anew"
            ) from error
        self._batch = Future()
        self._batch.set_result(batch)

    def close(self, at_once: bool = False) -> None:
        """Wait until the engine is free, unless `at_once`; an error that nobody asked for is said."""
        if self._batch is None or at_once:
            return
        wait([self._batch])
        if (error := self._batch.exception()) is not None:
            logger.warning("sampling the next update's rollouts failed: %s: %s", type(error).__name__, error)


def _group(rollouts: Sequence[dict[str, Any]], **fields: Any) -> Group:
    return Group(rollouts=[_rollout(**rollout) for rollout in rollouts], **fields)


def _rollout(
    sampled_ids: Sequence[int],
    sampled_logprobs: Sequence[Any],
    context_ids: Sequence[int],
    score_logprobs: Sequence[Any] | None,
    ending: Sequence[int] | None,
    **fields: Any,
) -> Rollout:
    return Rollout(
        sampled_ids=array("q", sampled_ids),
        sampled_logprobs=array("d", map(float, sampled_logprobs)),
        context_ids=array("q", context_ids),
        score_logprobs=None if score_logprobs is None else [float(x) for x in score_logprobs],
        ending=None if ending is None else (ending[0], ending[1]),
        **fields,
    )


def _plain(value: Any) -> Any:
    """A copy for JSON, in which a number that is not finite (a score that nucleus sampling cut) is its name."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | array):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
