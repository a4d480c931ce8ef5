"""Updates that train nothing: a run of them ends with an error, not with the start weights and a good status."""

from __future__ import annotations

import logging

from real_fast.errors import NothingTrainedError

logger = logging.getLogger(__name__)
_NO_SCORE = (
    "no rollout had a score: the model does not write scale.phrase and a score behind it, so train it to with "
    "warmup.steps, or set rollout.answer to forced"
)
_NOT_FINITE = "the gradient was not finite: lower optim.lr, or set train.precision to fp32"


class Idle:
    """Counts updates in a row that trained nothing, since no rollout had a score or every optimiser step was skipped.

    Args:
        limit: So many are too many; 0 for no limit.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.count = 0
        self._scored = self._stepped = True

    def begin(self, scored: bool) -> None:
        """An update begins; `scored` says whether any of its rollouts has a score."""
        self._scored, self._stepped = scored, False

    def step(self, stepped: bool) -> None:
        """One of its optimiser steps was taken, or was skipped since the gradient was not finite."""
        self._stepped |= stepped

    def end(self) -> NothingTrainedError | None:
        """The update is done. Warn of the first of a row; an error where there were too many, for the run to end."""
        if self._scored and self._stepped:
            self.count = 0
            return None
        self.count += 1
        why = _NOT_FINITE if self._scored else _NO_SCORE
        if self.count == 1:
            logger.warning("an update trained nothing, since %s", why)
        if self.limit and self.count >= self.limit:
            return NothingTrainedError(
                f"{self.count} updates in a row trained nothing (train.give_up_after), since {why}"
            )
        return None
