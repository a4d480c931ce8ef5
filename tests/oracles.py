"""The REAL loss one sequence at a time, in plain autograd: slow, obvious, and sharing no line with the package."""

from __future__ import annotations

from dataclasses import fields

import torch

from real_kernels import HeadOptions, RealObjective


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


OPTIONS = {
    "reward": "paper",
    "lam": 1.0,
    "beta": 1.0,
    "baseline": "leave_one_out",
    "normalize_std": True,
    "advantage_clip": 1.0,
    "loss_norm": "sequence_sum",
    "renormalize": False,
    "temperature": 1.0,
}


def records(**options):
    """Options by name, as real_loss takes them."""
    names = {f.name for f in fields(RealObjective) if f.init}
    objective = {name: value for name, value in options.items() if name in names}
    head = {name: value for name, value in options.items() if name not in names}
    return {"objective": RealObjective(**objective), "head": HeadOptions(**head)}


def make_sequences(seed, groups, size, d=5, v=23, k=4, longest=6, invalid=False):
    g = torch.Generator().manual_seed(seed)
    values = torch.sort(torch.randperm(12, generator=g)[:k].double())[0]
    score_ids = torch.randperm(v, generator=g)[:k]
    weight = torch.randn(v, d, generator=g, dtype=torch.float64).requires_grad_()
    sequences = []
    for group in range(groups):
        label = values[0] + (values[-1] - values[0]) * torch.rand((), generator=g, dtype=torch.float64)
        label = label if group % 2 else values[int(torch.randint(k, (), generator=g))]
        for _ in range(size):
            length = int(torch.randint(0, longest + 1, (), generator=g))
            sequences.append(
                {
                    "hidden": torch.randn(length, d, generator=g, dtype=torch.float64).requires_grad_(),
                    "targets": torch.randint(v, (length,), generator=g).tolist(),
                    "score_hidden": torch.randn(d, generator=g, dtype=torch.float64).requires_grad_(),
                    "label": float(label),
                    "group": group,
                    "valid": not (invalid and bool(torch.rand((), generator=g) < 0.3)),
                }
            )
    return sequences, weight, score_ids, values


def pack(sequences):
    hidden = torch.cat([s["hidden"] for s in sequences])
    targets = torch.tensor([t for s in sequences for t in s["targets"]], dtype=torch.int64)
    rollout = torch.tensor([i for i, s in enumerate(sequences) for _ in s["targets"]], dtype=torch.int64)
    return {
        "hidden": hidden,
        "targets": targets,
        "rollout": rollout,
        "score_hidden": torch.stack([s["score_hidden"] for s in sequences]),
        "labels": torch.tensor([s["label"] for s in sequences], dtype=torch.float64),
        "group": torch.tensor([s["group"] for s in sequences]),
        "rollout_valid": torch.tensor([s["valid"] for s in sequences]),
    }
