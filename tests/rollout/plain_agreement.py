"""Engine against trainer, a rollout at a time in float64: the oracle of the comparison."""

from __future__ import annotations

import torch

from real_fast.rollout.agreement import EngineGap


def plain_compare(rollouts, trainer_logprobs, trainer_scores, scale, mask=None):
    """As :func:`real_fast.rollout.agreement.compare`."""
    values = torch.tensor(scale.values, dtype=torch.float64)
    tokens, scores = [], []
    for i, rollout in enumerate(rollouts):
        mine, theirs = _vector(rollout.sampled_logprobs), _vector(trainer_logprobs[i])
        chosen = torch.ones(len(mine), dtype=torch.bool) if mask is None else torch.as_tensor(mask[i]).bool()
        if not mine.shape == theirs.shape == chosen.shape:
            raise ValueError(
                f"rollout {i} has {len(mine)} sampled tokens, and the trainer's log-probabilities {len(theirs)}, the "
                f"mask {len(chosen)}"
            )
        tokens.append((mine - theirs)[chosen].abs())
        if rollout.score_logprobs is not None and trainer_scores[i] is not None:
            mine, theirs = _vector(rollout.score_logprobs), _vector(trainer_scores[i])
            if not mine.shape == theirs.shape == values.shape:
                raise ValueError(
                    f"rollout {i}: {len(mine)} and {len(theirs)} score log-probabilities for {len(values)} scores"
                )
            scores.append(((mine.exp() - theirs.exp()) @ values).abs().reshape(1) / scale.span)
    found = [torch.cat(some) if some else torch.zeros(0) for some in (tokens, scores)]
    spread = [(float(x.mean()), float(x.max())) if x.numel() else (0.0, 0.0) for x in found]
    return EngineGap(len(found[0]), *spread[0], len(found[1]), *spread[1])


def _vector(numbers):
    return torch.as_tensor(numbers, dtype=torch.float64).detach().cpu().reshape(-1)
