"""Supervised fine-tuning: cross-entropy of the given feedback, the phrase and the score."""

from __future__ import annotations

from real_fast.methods.supervised import LossWeights, Supervised

SFT = LossWeights(feedback=1.0, score=1.0)


class Sft(Supervised):
    """See :class:`real_fast.methods.supervised.Supervised`."""

    name = "sft"
    weights = SFT
