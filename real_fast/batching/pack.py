"""One micro-batch: what goes through the body, and which of its rows go to the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from real_fast.attention.layout import Layout
from real_fast.types import Batch, Group, Rollout
from real_fast.utils.flat import flat


def pack_batch(groups: Sequence[Group]) -> Batch:
    """One row: each group's prompt once, then its responses. No loop over tokens, no padding."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    layout = Layout.of_groups([(len(g.prompt_ids), [len(r.input_ids) for r in g.rollouts]) for g in groups])
    ids = flat(part for g in groups for part in (g.prompt_ids, *(r.input_ids for r in g.rollouts)))
    prompts = torch.tensor([len(g.prompt_ids) for g in groups])
    count = torch.tensor([len(g.rollouts) for g in groups])
    length = torch.tensor([len(r.input_ids) for r in rollouts])
    # Where each prompt ends and each response starts: everything before it, prompts once and responses.
    prompts_so_far = torch.repeat_interleave(prompts.cumsum(0), count)
    start = prompts_so_far + length.cumsum(0) - length
    first = torch.repeat_interleave(count.cumsum(0) - count, count)  # each rollout's group's first rollout
    return _batch(
        groups,
        input_ids=ids[None],
        position_ids=layout.position_ids()[None],
        layout=layout,
        attention_mask=None,
        prompt_end=start[first] - 1,
        response_start=start,
    )


def pack_batches(parts: Sequence[Sequence[Group]]) -> list[Batch]:
    """:func:`pack_batch` of each part: all are packed as one row, in a few large steps, and the row is cut.

    The tensors of all batches but the smallest are views of the same ones.
    """
    whole = pack_batch([group for part in parts for group in part])
    assert whole.layout is not None
    token = segment = target = rollout = ending = 0  # where a part begins
    batches = []
    for part in parts:
        rollouts = [r for group in part for r in group.rollouts]
        tokens = slice(token, token + sum(group.shared_tokens for group in part))
        segments = slice(segment, segment + len(part) + sum(1 for r in rollouts if r.input_ids))
        targets = slice(target, target + sum(len(r.targets) for r in rollouts))
        mine = slice(rollout, rollout + len(rollouts))
        endings = slice(ending, ending + sum(1 for r in rollouts if r.ending is not None))
        scores = whole.engine_score_logprobs[mine]
        batches.append(
            Batch(
                input_ids=whole.input_ids[:, tokens],
                position_ids=whole.position_ids[:, tokens],
                layout=Layout(whole.layout.segments[segments] - torch.tensor([token, 0, token, 0])),
                attention_mask=None,
                rows=whole.rows[targets] - token,
                targets=whole.targets[targets],
                sampled_logprobs=whole.sampled_logprobs[targets],
                rollout=whole.rollout[targets] - rollout,
                score_rows=whole.score_rows[mine] - token,
                labels=whole.labels[mine],
                group=whole.group[mine],
                rollout_valid=whole.rollout_valid[mine],
                engine_score_logprobs=scores if any(r.score_logprobs is not None for r in rollouts) else scores[:, :0],
                outcome=whole.outcome[mine],
                endings=whole.endings[endings] - target,
                placeholder=part[0].index < 0,
            )
        )
        token, segment, target = tokens.stop, segments.stop, targets.stop
        rollout, ending = mine.stop, endings.stop
    return batches


def pad_batch(groups: Sequence[Group], pad_id: int) -> Batch:
    """One sequence per rollout, each with its own prompt, right-padded."""
    pairs = [(group, rollout) for group in groups for rollout in group.rollouts]
    width = max(group.longest for group in groups)
    input_ids = torch.full((len(pairs), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(len(pairs), width, dtype=torch.int64)
    for i, (group, rollout) in enumerate(pairs):
        ids = flat([group.prompt_ids, rollout.input_ids])
        input_ids[i, : len(ids)] = ids
        attention_mask[i, : len(ids)] = 1
    start = torch.arange(len(pairs)) * width + torch.tensor([len(group.prompt_ids) for group, _ in pairs])
    return _batch(
        groups,
        input_ids=input_ids,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        layout=None,
        attention_mask=attention_mask,
        prompt_end=start - 1,
        response_start=start,
    )


def _batch(groups: Sequence[Group], *, prompt_end: torch.Tensor, response_start: torch.Tensor, **inputs: Any) -> Batch:
    """Which rows go to the head, given where each rollout's prompt ends and its response starts ([M] each)."""
    pairs = [(group, rollout) for group in groups for rollout in group.rollouts]
    n = torch.tensor([len(rollout.targets) for _, rollout in pairs])
    ends = torch.tensor([rollout.ending is not None for _, rollout in pairs])
    length = torch.tensor([len(rollout.context_ids) for _, rollout in pairs])
    last = n.cumsum(0) - 1
    first = last + 1 - n
    # A token is predicted one position before it: the first one by the prompt's last token.
    rows = torch.arange(int(n.sum())) + torch.repeat_interleave(response_start - 1 - first, n)
    rows[first[n > 0]] = prompt_end[n > 0]
    # The end of an answer is predicted by the score's token, which stands right behind the context.
    endings = last[ends]
    rows[endings] = (response_start + length)[ends]
    return Batch(
        **inputs,
        rows=rows,
        targets=flat(r.targets for _, r in pairs),
        sampled_logprobs=flat(
            (part for _, r in pairs for part in (r.sampled_logprobs, (0.0,) * (r.ending is not None))), torch.float64
        ),
        rollout=torch.repeat_interleave(torch.arange(len(pairs)), n),
        score_rows=torch.where(length > 0, response_start + length - 1, prompt_end),
        labels=torch.tensor(
            [label for g in groups for label in g.labels or [g.label] * len(g.rollouts)], dtype=torch.float32
        ),
        group=torch.tensor([group.index for group, _ in pairs]),
        rollout_valid=torch.tensor([rollout.has_score for _, rollout in pairs]),
        engine_score_logprobs=_engine_score_logprobs([rollout for _, rollout in pairs]),
        endings=endings,
        outcome=torch.tensor([-1 if rollout.outcome is None else rollout.outcome for _, rollout in pairs]),
        placeholder=groups[0].index < 0,
    )


def _engine_score_logprobs(rollouts: Sequence[Rollout]) -> torch.Tensor:
    k = max((len(r.score_logprobs) for r in rollouts if r.score_logprobs is not None), default=0)
    return torch.tensor([[0.0] * k if r.score_logprobs is None else r.score_logprobs for r in rollouts])
