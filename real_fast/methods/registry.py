"""Which loss a method trains on."""

from __future__ import annotations

from typing import Literal

import torch

from real_fast.config import Config
from real_fast.methods.objective import Loss, LossOutput, Totals, binary_objective, real_objective
from real_fast.methods.proximal import proximal_objective, with_kl
from real_fast.methods.supervised import RAFT, SFT, Terms, supervised_objective
from real_fast.score.scale import ScoreScale


def method_loss(
    config: Config,
    scale: ScoreScale,
    totals: Totals,
    every_row: bool,
    reference: torch.Tensor | None = None,
    first: LossOutput | None = None,
) -> Loss:
    """The method's loss of one micro-batch.

    Args:
        config: Settings: method, objective, supervised.squared_error, rollout.temperature.
        scale: The score scale.
        totals: Counts over the update.
        every_row: Compute the log-probability of rows with coefficient 0 too.
        reference: [N] the reference's log-probabilities of this micro-batch's sampled tokens, where they are wanted.
        first: What the first iteration on these rollouts returned; None in the first.
    """
    options, temperature = config.objective, config.rollout.temperature
    if not config.samples:
        tract = Terms(feedback=1.0, squared_error=config.supervised.squared_error)
        terms = {"sft": SFT, "raft": RAFT, "tract": tract}[config.method]
        return supervised_objective(terms, scale, totals, options.renormalize)
    binary = config.method == "binary_rl"
    if options.proximal:
        held = reference if options.kl_coef else None
        method: Literal["real", "binary_rl"] = "binary_rl" if binary else "real"
        loss = proximal_objective(method, options, scale, temperature, totals, every_row, held, first)
    else:
        loss = (binary_objective if binary else real_objective)(options, scale, temperature, totals, every_row)
    if reference is None or options.kl_coef or first is not None:
        return loss
    return with_kl(loss, reference, temperature)
