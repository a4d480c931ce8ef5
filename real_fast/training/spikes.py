"""Gradients that are suddenly many times as large as those before: a line in the log, for whoever asks later."""

from __future__ import annotations

import logging
from collections import deque
from statistics import median

logger = logging.getLogger(__name__)

_TIMES = 1000.0  # of the median; the norms of a healthy run stay within a factor of ten or so
_KNOWN, _FEWEST = 50, 5  # steps that the median is of


class Spikes:
    """Watches the gradient norms of the steps that are taken. It changes nothing and is in no checkpoint.

    Args:
        max_grad_norm: What they are clipped to; 0 for no clipping.
    """

    def __init__(self, max_grad_norm: float) -> None:
        self.max_grad_norm = max_grad_norm
        self._norms: deque[float] = deque(maxlen=_KNOWN)

    def see(self, norm: float) -> None:
        """A step was taken on a gradient of this norm, before clipping; 0 (all rewards were alike) tells nothing."""
        if norm == 0:
            return
        if len(self._norms) >= _FEWEST and norm > _TIMES * (usual := median(self._norms)):
            done = f"it was clipped to {self.max_grad_norm:g}" if self.max_grad_norm else "and it was not clipped"
            logger.warning(
                "the gradient's norm is %.3g, %.3g times its median over the last %d steps; %s (optim.max_grad_norm). "
                "Where this comes again and again, lower optim.lr, and look at the step's rollouts",
                norm,
                norm / usual,
                len(self._norms),
                done,
            )
        self._norms.append(norm)
