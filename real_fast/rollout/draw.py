"""Drawing tokens from logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Rows whose distribution is summed up in float64 at a time.
_ROWS = 64


def draw(
    logits: torch.Tensor, uniform: Sequence[float], temperature: float, top_p: float
) -> tuple[list[int], list[float]]:
    """Sample a token per row by inverting its distribution at a uniform number.

    Args:
        logits: [rows, vocabulary] fp32.
        uniform: A number in [0, 1) per row.
        temperature: 0 takes the most likely token.
        top_p: The smallest set of most likely tokens with at least this mass is sampled from.

    Returns:
        A token per row and its log-probability at the temperature (1 for greedy) over the whole vocabulary.
    """
    logprobs = (logits / temperature if temperature > 0 else logits).log_softmax(-1)
    if temperature <= 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        numbers = torch.tensor(uniform, dtype=torch.float64, device=logits.device)[:, None]
        pairs = zip(logprobs.split(_ROWS), numbers.split(_ROWS), strict=True)
        tokens = torch.cat([_invert(rows.double().exp(), u, top_p) for rows, u in pairs])
    return tokens[:, 0].tolist(), logprobs.gather(-1, tokens)[:, 0].tolist()


def _invert(probs: torch.Tensor, uniform: torch.Tensor, top_p: float) -> torch.Tensor:
    """[rows, 1] tokens at which the cumulated `probs` ([rows, vocabulary] fp64) pass `uniform` ([rows, 1] fp64)."""
    if top_p >= 1:
        order, total = None, (cumulated := probs.cumsum(-1))[:, -1:]
    else:
        probs, order = probs.sort(-1, descending=True)
        cumulated = probs.cumsum(-1)
        last = (cumulated < top_p).sum(-1, keepdim=True).clamp(max=probs.shape[-1] - 1)
        total = cumulated.gather(-1, last)
    # Strictly below the total, or rounding could choose a token without probability behind it.
    at = torch.searchsorted(cumulated, torch.minimum(uniform * total, total * (1 - 1e-15)), right=True)
    at = at.clamp(max=probs.shape[-1] - 1)  # only with NaN, which the caller reports
    return at if order is None else order.gather(-1, at)
