"""Packing token by token, as plain as can be: what the packing must equal to the last bit."""

from __future__ import annotations

import torch

from real_fast.attention.layout import Layout
from real_fast.types import Batch


def plain_pack(groups):
    """One packed row."""
    ids, positions, segments, spans = [], [], [], []
    for g in groups:
        prompt, before = len(ids), len(g.prompt_ids)
        segments.append((prompt, before, prompt, 0))
        ids += g.prompt_ids
        positions += range(before)
        for r in g.rollouts:
            start, length = len(ids), len(r.input_ids)
            if length:
                segments.append((start, length, prompt, before))
            ids += r.input_ids
            positions += range(before, before + length)
            spans.append((prompt + before - 1, start))
    row = {"input_ids": [ids], "position_ids": [positions]}
    return _batch(groups, spans, row, Layout(torch.tensor(segments, dtype=torch.int64)))


def plain_pad(groups, pad_id):
    """A padded sequence per rollout."""
    sequences = [[*g.prompt_ids, *r.input_ids] for g in groups for r in g.rollouts]
    width = max(map(len, sequences))
    starts = [len(g.prompt_ids) for g in groups for _ in g.rollouts]
    spans = [(i * width + start - 1, i * width + start) for i, start in enumerate(starts)]
    row = {
        "input_ids": [ids + [pad_id] * (width - len(ids)) for ids in sequences],
        "position_ids": [[*range(len(ids)), *[len(ids) - 1] * (width - len(ids))] for ids in sequences],
        "attention_mask": [[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences],
    }
    return _batch(groups, spans, row, None)


def _batch(groups, spans, row, layout):
    """`spans`: where each rollout's prompt ends, and where its response starts."""
    rows, targets, logprobs, owner, endings, scores = [], [], [], [], [], []
    rollouts = [r for g in groups for r in g.rollouts]
    k = max((len(r.score_logprobs) for r in rollouts if r.score_logprobs is not None), default=0)
    for i, (r, (end, start)) in enumerate(zip(rollouts, spans, strict=True)):
        for place, (token, logprob) in enumerate(zip(r.sampled_ids, r.sampled_logprobs, strict=True)):
            rows.append(end if place == 0 else start + place - 1)
            targets.append(token)
            logprobs.append(logprob)
        if r.ending is not None:
            endings.append(len(rows))
            rows.append(start + len(r.context_ids))
            targets.append(r.ending[1])
            logprobs.append(0.0)
        owner += [i] * len(r.targets)
        scores.append(start + len(r.context_ids) - 1 if r.context_ids else end)
    return Batch(
        **{name: torch.tensor(values, dtype=torch.int64) for name, values in row.items()},
        **({} if "attention_mask" in row else {"attention_mask": None}),
        layout=layout,
        rows=torch.tensor(rows, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        sampled_logprobs=torch.tensor(logprobs, dtype=torch.float64),
        rollout=torch.tensor(owner, dtype=torch.int64),
        score_rows=torch.tensor(scores),
        labels=torch.tensor([x for g in groups for x in (g.labels or [g.label] * len(g.rollouts))]),
        group=torch.tensor([g.index for g in groups for _ in g.rollouts]),
        rollout_valid=torch.tensor([r.has_score for r in rollouts]),
        engine_score_logprobs=torch.tensor([r.score_logprobs or [0.0] * k for r in rollouts]),
        outcome=torch.tensor([-1 if r.outcome is None else r.outcome for r in rollouts]),
        endings=torch.tensor(endings, dtype=torch.int64),
        placeholder=groups[0].index < 0,
    )
