"""From groups of rollouts to micro-batches: what goes through the body, and which rows go to the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from real_fast.config import Config
from real_fast.data import JudgeRow
from real_fast.rollout.base import Rollout
from real_fast.scale import ScoreScale


class BatchError(ValueError):
    """A group that fits into no micro-batch."""


@dataclass
class Group:
    """The rollouts of one prompt.

    Attributes:
        index: The group's place in the update.
        prompt_ids: Token ids of the prompt.
        label: Label on the scale.
        rollouts: K rollouts.
    """

    index: int
    prompt_ids: Sequence[int]
    label: float
    rollouts: Sequence[Rollout]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt included."""
        return len(self.prompt_ids) + max(len(r.context_ids) for r in self.rollouts)


@dataclass
class Batch:
    """One micro-batch. Rows are flat positions in [B * T]; a row predicts the token after it.

    Attributes:
        input_ids: [B, T] int64, right-padded.
        attention_mask: [B, T] int64, 1 on tokens.
        position_ids: [B, T] int64.
        rows: [N] int64, positions before each sampled token.
        targets: [N] int64, the sampled tokens (a sampled EOS is a target although it is not in the input).
        rollout: [N] int64 in 0..M-1.
        score_rows: [M] int64, the last context token of each rollout, where the score distribution is read.
        labels: [M] float32.
        group: [M] int64, the group's place in the update.
        valid: [M] bool, rollouts that have a score.
        sampled_logprobs: [N] float32, log-probabilities from the engine.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    rollout: torch.Tensor
    score_rows: torch.Tensor
    labels: torch.Tensor
    group: torch.Tensor
    valid: torch.Tensor
    sampled_logprobs: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def require_room(rows: Sequence[JudgeRow], scale: ScoreScale, config: Config) -> None:
    """Refuse, before the work starts, settings under which a group may not fit into a micro-batch.

    Raises:
        BatchError: The longest prompt with its K longest possible rollouts exceeds ``train.micro_batch_tokens``.
    """
    longest = max(len(row.prompt_ids) for row in rows)
    rollout = config.rollout.max_tokens + len(scale.phrase_ids)
    need = config.rollout.group_size * (longest + rollout)
    if need > config.train.micro_batch_tokens:
        raise BatchError(
            f"train.micro_batch_tokens is {config.train.micro_batch_tokens}, and a group of "
            f"{config.rollout.group_size} rollouts of the longest prompt ({longest} tokens, up to {rollout} behind it) "
            f"needs {need}: raise it, or lower rollout.group_size, rollout.max_tokens or prompt.max_tokens"
        )


def micro_batches(groups: Sequence[Group], budget: int, pad_id: int) -> list[Batch]:
    """Spread groups over micro-batches of at most `budget` tokens, padding included; a group is never split.

    Groups are sorted by length, so that a micro-batch holds groups of similar length.

    Raises:
        BatchError: A group longer than the budget.
    """
    for group in groups:
        need = len(group.rollouts) * group.longest
        if need > budget:
            raise BatchError(
                f"a group of {len(group.rollouts)} rollouts of up to {group.longest} tokens needs {need} tokens in one "
                f"micro-batch, and train.micro_batch_tokens is {budget}: raise it, or lower rollout.group_size, "
                "rollout.max_tokens or prompt.max_tokens"
            )
    batches: list[list[Group]] = []
    used = 0
    for group in sorted(groups, key=lambda g: (-g.longest, g.index)):
        # The first group of a micro-batch is its longest, so it sets the width for all.
        if batches and (used + len(group.rollouts)) * batches[-1][0].longest <= budget:
            batches[-1].append(group)
            used += len(group.rollouts)
        else:
            batches.append([group])
            used = len(group.rollouts)
    return [pad_batch(part, pad_id) for part in batches]


def pad_batch(groups: Sequence[Group], pad_id: int) -> Batch:
    """One sequence per rollout, each with its own prompt, right-padded."""
    pairs = [(group, rollout) for group in groups for rollout in group.rollouts]
    width = max(group.longest for group in groups)
    input_ids = torch.full((len(pairs), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(len(pairs), width, dtype=torch.int64)
    rows, targets, sampled, lengths, score_rows = [], [], [], [], []
    for i, (group, rollout) in enumerate(pairs):
        ids = torch.tensor([*group.prompt_ids, *rollout.context_ids], dtype=torch.int64)
        input_ids[i, : len(ids)] = ids
        attention_mask[i, : len(ids)] = 1
        n = len(rollout.sampled_ids)
        # A sampled token is predicted one position before it: the first one by the prompt's last token.
        rows.append(torch.arange(n) + i * width + len(group.prompt_ids) - 1)
        targets.append(torch.tensor(rollout.sampled_ids, dtype=torch.int64))
        sampled.append(torch.tensor(rollout.sampled_logprobs, dtype=torch.float32))
        lengths.append(n)
        score_rows.append(i * width + len(ids) - 1)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        rows=torch.cat(rows),
        targets=torch.cat(targets),
        rollout=torch.repeat_interleave(torch.arange(len(pairs)), torch.tensor(lengths)),
        score_rows=torch.tensor(score_rows),
        labels=torch.tensor([group.label for group, _ in pairs], dtype=torch.float32),
        group=torch.tensor([group.index for group, _ in pairs]),
        valid=torch.tensor([rollout.has_score for _, rollout in pairs]),
        sampled_logprobs=torch.cat(sampled),
    )
