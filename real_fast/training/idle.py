"""Updates that train nothing: a run of them ends with an error, not with the start weights and a good status."""

from __future__ import annotations

import logging

from real_fast.errors import NothingTrainedError
from real_fast.runs.checkpoint import TrainState

logger = logging.getLogger(__name__)
_NO_SCORE = (
    "no rollout had a score: the model does not write scale.phrase and a score behind it, so train it to with "
    "warmup.steps, or set rollout.answer to forced"
)
_NOT_FINITE = "the gradient was not finite: lower optim.lr, or set train.precision to fp32"
_BEFORE = "as metrics.jsonl says (score/no_score, skipped_steps)"


class Idle:
    """Counts updates in a row that trained nothing, since no rollout had a score or every optimiser step was skipped.

    Args:
        limit: So many are too many; 0 for no limit.
        state: Has the count, which a resumed run goes on with.
    """

    def __init__(self, limit: int, state: TrainState) -> None:
        self.limit = limit
        self.state = state
        self._scored = self._stepped = True
        self._why = _BEFORE

    def begin(self, scored: bool) -> None:
        """An update begins; `scored` says whether any of its rollouts has a score."""
        self._scored, self._stepped = scored, False

    def step(self, stepped: bool) -> None:
        """One of its optimiser steps was taken, or was skipped since the gradient was not finite."""
        self._stepped |= stepped

    def end(self) -> NothingTrainedError | None:
        """The update is done. Warn of the first of a row; an error where there were too many, for the run to end."""
        if self._scored and self._stepped:
            self.state.idle_updates = 0
            return None
        self.state.idle_updates += 1
        count, self._why = self.state.idle_updates, _NOT_FINITE if self._scored else _NO_SCORE
        if count == 1:
            logger.warning("an update trained nothing, since %s", self._why)
        if self.limit and count >= self.limit:
            return NothingTrainedError(
                f"{count} updates in a row trained nothing (train.give_up_after), since {self._why}"
            )
        return None

    def check_run(self, updates: int) -> None:
        """Refuse to call a run of fewer updates than the limit finished where none of them trained anything.

        Args:
            updates: All that the run has made, before it was resumed too.

        Raises:
            NothingTrainedError: None did, and there is a limit.
        """
        if self.limit and 0 < updates <= self.state.idle_updates:
            raise NothingTrainedError(
                f"none of the {updates} updates trained anything, since {self._why}. No final/ is written; --resume "
                "--train.give_up_after 0 writes it all the same"
            )
