"""The REAL loss one sequence at a time, in plain autograd: slow, obvious, and sharing no line with the package."""

from __future__ import annotations

import torch


def interpolate(values, per_value, label):
    """Linear interpolation of per_value[k] at `label`."""
    for k in range(len(values) - 1):
        low, high = values[k], values[k + 1]
        if low <= label <= high:
            share = (label - low) / (high - low)
            return (1 - share) * per_value[k] + share * per_value[k + 1]
    raise AssertionError("label off the scale")


def naive_advantages(rewards, baseline, normalize_std, clip):
    """Of one group's valid rewards (a list of floats)."""
    n = len(rewards)
    if n < 2:
        return [0.0] * n
    mean = sum(rewards) / n
    std = (sum((r - mean) ** 2 for r in rewards) / n) ** 0.5
    out = []
    for i, r in enumerate(rewards):
        others = [x for j, x in enumerate(rewards) if j != i]
        a = r - (sum(others) / len(others) if baseline == "leave_one_out" else mean)
        if normalize_std:
            a /= std + 1e-4
        if clip:
            a = max(-clip, min(clip, a))
        out.append(a)
    return out


def naive_real_loss(
    sequences,
    weight,
    score_ids,
    values,
    *,
    reward,
    lam,
    beta,
    baseline,
    normalize_std,
    advantage_clip,
    loss_norm,
    renormalize,
    temperature,
):
    """`sequences`: dicts with hidden [T, D], targets (list of T), score_hidden [D], label, group, valid."""
    scored = []
    for s in sequences:
        logits = weight @ s["score_hidden"]
        logp_all = logits - torch.log(torch.exp(logits - logits.max()).sum()) - logits.max()
        logp = [logp_all[i] for i in score_ids]
        if renormalize:
            total = torch.log(sum(torch.exp(x) for x in logp))
            logp = [x - total for x in logp]
        y_hat = sum(v * torch.exp(x) for v, x in zip(values, logp, strict=True))
        squared = -((y_hat - s["label"]) ** 2)
        if reward == "paper":
            r = squared + lam * interpolate(values, logp, s["label"])
            scored.append(([r], [1.0], r))
        else:
            p = interpolate(values, [torch.exp(x) for x in logp], s["label"])
            scored.append(([squared, p], [1.0, lam], squared))
    advantages = [0.0] * len(sequences)
    for g in {s["group"] for s in sequences}:
        members = [i for i, s in enumerate(sequences) if s["group"] == g and s["valid"]]
        if not members:
            continue
        for part in range(len(scored[members[0]][0])):
            rewards = [float(scored[i][0][part].detach()) for i in members]
            for i, a in zip(members, naive_advantages(rewards, baseline, normalize_std, advantage_clip), strict=True):
                advantages[i] += scored[i][1][part] * a
    valid = [i for i, s in enumerate(sequences) if s["valid"]]
    tokens = sum(len(sequences[i]["targets"]) for i in valid)
    denominator = len(valid) if loss_norm == "sequence_sum" else tokens
    loss = 0 * weight.sum()
    for i in valid:
        s = sequences[i]
        logprob = torch.zeros((), dtype=weight.dtype)
        for h, target in zip(s["hidden"], s["targets"], strict=True):
            logprob = logprob + torch.log_softmax((weight @ h) / temperature, 0)[target]
        loss = loss - advantages[i] * logprob / max(denominator, 1) - beta * scored[i][2] / max(len(valid), 1)
    return loss, advantages
