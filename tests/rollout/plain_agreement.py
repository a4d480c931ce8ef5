"""Engine against trainer, a rollout at a time in float64: the oracle of the comparison."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from real_fast.rollout.agreement import EngineGap


def plain_compare(rollouts, trainer_logprobs, trainer_scores, scale, mask=None):
    """As :func:`real_fast.rollout.agreement.gap`, on lists of each rollout's."""
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


def trainer_logprobs_of(model, prompts, rollouts, scale, temperature, autocast_dtype=None):
    """What the comparison needs, by one plain forward pass per sequence: slow, and simple enough to trust.

    Args:
        model: A Transformers causal language model; its mode (training or evaluation) is left as it is.
        prompts: Token ids, one prompt for each rollout.
        rollouts: The rollouts.
        scale: The score scale.
        temperature: The sampling temperature; 0 counts as 1.
        autocast_dtype: Run the forward passes under autocast with this dtype.

    Returns:
        For each rollout the log-probabilities of its sampled ids, [tokens] fp32; and the K log-probabilities of the
        score tokens behind its context (temperature 1), [K] fp32, or None where it has no score.
    """
    logprobs, scores = [], []
    autocast = nullcontext() if autocast_dtype is None else torch.autocast(model.device.type, autocast_dtype)
    with torch.no_grad(), autocast:
        for prompt, rollout in zip(prompts, rollouts, strict=True):
            ids = torch.tensor([[*prompt, *rollout.context_ids]], device=model.device)
            # Row i of what is kept predicts the i-th token behind the prompt; the last row is where the score stands.
            rows = len(rollout.context_ids) + 1
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=rows).logits[0].float()
            targets = torch.tensor(rollout.sampled_ids, dtype=torch.int64, device=model.device)
            sampled = (logits[: len(targets)] / (temperature or 1.0)).log_softmax(-1)
            logprobs.append(sampled.gather(-1, targets[:, None])[:, 0])
            scores.append(logits[-1].log_softmax(-1)[scale.ids_tensor(model.device)] if rollout.has_score else None)
    return logprobs, scores


def _vector(numbers):
    return torch.as_tensor(numbers, dtype=torch.float64).detach().cpu().reshape(-1)
