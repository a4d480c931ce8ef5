"""RAFT (arXiv 2503.04381): squared error of the expected score, behind given feedback or right behind the phrase."""

from __future__ import annotations

import logging

from real_fast.config import Config
from real_fast.methods.supervised import LossWeights, Supervised

logger = logging.getLogger(__name__)
RAFT = LossWeights(squared_error=1.0, end=1.0)


class Raft(Supervised):
    """See :class:`real_fast.methods.supervised.Supervised`; the only method that goes without feedback."""

    name = "raft"
    weights = RAFT

    @classmethod
    def check(cls, config: Config) -> None:
        """A model trained without feedback is best evaluated so."""
        if config.supervised.feedback == "none" and config.eval.protocol != "raft":
            logger.warning(
                "eval.protocol is %s: the evaluations let the model write feedback, which it does not learn here; raft "
                "reads the score right behind the phrase",
                config.eval.protocol,
            )
