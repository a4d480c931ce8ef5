"""One update by each contender, on the same groups with the same model: REAL's loss, its gradient, AdamW.

- ``reference``: as the authors' code does it. A pass without gradients over full logits gives ŷ, hence rewards and
  advantages; a second pass with full logits, forward and backward. Every rollout carries its own prompt.
- ``ours``: one pass, the prompt once per group, only the rows that matter through the head; and the same with one
  idea switched off at a time.

TRL stands in ``benchmarks/trl_step.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from benchmarks.phases import Phases, optimizer_for, optimizer_step
from benchmarks.workload import Workload
from real_fast.attention.interface import pick_backend
from real_fast.batching.micro_batches import micro_batches
from real_fast.batching.pack import pad_batch
from real_fast.config import Config
from real_fast.methods.base import UpdateCounts
from real_fast.methods.real import Real
from real_fast.model.compiled import CompiledLayers
from real_fast.model.liger import LigerLayers
from real_fast.model.policy import Policy
from real_fast.score.scale import ScoreScale
from real_fast.types import Batch, Group
from real_kernels import HeadOptions, group_advantages, reward_parts, score_logprobs

Variant = Literal[
    "ours", "no shared prompt", "two forwards", "full logits", "every row", "compiled layers", "Liger's layers"
]
VARIANTS: tuple[Variant, ...] = ("ours", "no shared prompt", "two forwards", "full logits", "every row")
# Ours with other code for the layers, on a GPU.
FASTER: tuple[Variant, ...] = ("compiled layers", "Liger's layers")


class OurStep:
    """An update as ``real_fast.train`` does it.

    Args:
        model: A causal language model, trained in place (with a learning rate of nothing).
        scale: The score scale.
        workload: The groups.
        budget: Most tokens per forward pass.
        variant: "ours", or what is switched off: "no shared prompt" (a padded sequence per rollout), "two forwards"
            (one more pass, without gradients, over the body and the score rows), "full logits" (of every token, by
            autograd), "every row" (rows with coefficient 0 go through the head too); or what its layers are.
        autocast: Dtype of the body's matrix products; None for the weights' own.
        attention: Backend for shared prompts.
        optimize: Whether to take the optimiser's step too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        scale: ScoreScale,
        workload: Workload,
        budget: int,
        variant: Variant = "ours",
        autocast: torch.dtype | None = torch.bfloat16,
        attention: str = "auto",
        optimize: bool = True,
    ) -> None:
        self.shared = variant != "no shared prompt"
        backend = pick_backend(attention, model.device, autocast or model.dtype)
        self.policy = Policy(model, autocast, backend if self.shared else None)
        if variant in FASTER:
            self.policy.faster = CompiledLayers(model) if variant == "compiled layers" else LigerLayers(model)
        self.scale, self.groups, self.budget, self.variant = scale, workload.groups, budget, variant
        totals = UpdateCounts.of(self.groups)
        self.objective: Callable[..., Any] = (
            full_logits_objective(scale, totals)
            if variant == "full logits"
            else Real(Config(), lambda _: [], scale).loss(totals, compare=variant == "every row")
        )
        self.optimizer = optimizer_for(model) if optimize else None
        self.body_tokens = 0

    def _scores(self, hidden: torch.Tensor, weight: torch.Tensor, batch: Batch) -> torch.Tensor:
        ids = self.scale.ids_tensor(hidden.device)
        return score_logprobs(hidden[batch.score_rows], weight, ids, head=HeadOptions(validate=False))

    def step(self, phases: Phases) -> float:
        """One update. Returns the loss."""
        policy, loss = self.policy, 0.0
        policy.train()
        self.body_tokens = 0
        with phases("pack"):
            batches = micro_batches(self.groups, self.budget, 0, self.shared)
            batches = [batch.to(policy.model.device) for batch in batches]
        with phases.body(policy.model.base_model):
            if self.variant == "two forwards":
                with torch.no_grad():
                    for batch in batches:
                        self.body_tokens += batch.input_ids.numel()
                        with phases("head"):
                            policy(batch, self._scores)
            for batch in batches:
                self.body_tokens += batch.input_ids.numel()
                with phases("head"):
                    out = policy(batch, self.objective)
                with phases("backward"):
                    out.loss.backward()
                    loss += float(out.loss.detach())
        optimizer_step(policy, self.optimizer, phases)
        return loss


def full_logits_objective(scale: ScoreScale, totals: UpdateCounts) -> Callable[..., Any]:
    """REAL's loss by autograd through float32 logits of every token that went through the body."""

    def loss(hidden: torch.Tensor, weight: torch.Tensor, batch: Batch) -> Any:
        logp = (hidden.to(weight.dtype) @ weight.t()).float().log_softmax(-1)
        return _loss_of_logprobs(logp, None, batch, scale, totals)

    return loss


class _Out:
    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


def _loss_of_logprobs(
    logp: torch.Tensor, advantages: torch.Tensor | None, batch: Batch, scale: ScoreScale, totals: UpdateCounts
) -> _Out:
    device = logp.device
    values, labels = scale.values_tensor(device).float(), batch.labels
    terms = reward_parts(logp[batch.score_rows][:, scale.ids_tensor(device)], values, labels)
    if advantages is None:
        advantages = group_advantages(terms.reward.detach(), batch.group)
    chosen = logp[batch.rows].gather(1, batch.targets[:, None])[:, 0]
    return _Out(
        -(advantages[batch.rollout] * chosen).sum() / totals.rollouts - terms.refinement.sum() / totals.rollouts
    )


class ReferenceStep:
    """The reference-style update; see the module's docstring.

    Args:
        model: As above.
        scale: The score scale.
        workload: The groups.
        sequences: Sequences per forward pass, as memory allows.
        autocast: Dtype of the matrix products; None for the weights' own.
        optimize: Whether to take the optimiser's step too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        scale: ScoreScale,
        workload: Workload,
        sequences: int,
        autocast: torch.dtype | None = torch.bfloat16,
        optimize: bool = True,
    ) -> None:
        self.model, self.scale, self.groups = model, scale, workload.groups
        self.sequences, self.autocast = sequences, autocast
        self.totals = UpdateCounts.of(self.groups)
        self.optimizer = optimizer_for(model) if optimize else None
        self.body_tokens = 0

    def step(self, phases: Phases) -> float:
        """One update. Returns the loss."""
        model, device, loss = self.model, self.model.device, 0.0
        model.train()
        self.body_tokens = 0
        with phases("pack"):
            batches = [pad_batch(part, 0).to(device) for part in _chunks(self.groups, self.sequences)]
        with phases.body(model.base_model):
            rewards = []
            for batch in batches:
                with torch.no_grad(), phases("head"):
                    logp = self._logits(batch)[batch.score_rows].log_softmax(-1)
                    values = self.scale.values_tensor(device).float()
                    rewards.append(reward_parts(logp[:, self.scale.ids_tensor(device)], values, batch.labels).reward)
            group = torch.cat([batch.group for batch in batches])
            advantages = group_advantages(torch.cat(rewards), group).split([len(r) for r in rewards])
            for batch, part in zip(batches, advantages, strict=True):
                with phases("head"):
                    out = _loss_of_logprobs(self._logits(batch).log_softmax(-1), part, batch, self.scale, self.totals)
                with phases("backward"):
                    out.loss.backward()
                    loss += float(out.loss.detach())
                del out
        optimizer_step(model, self.optimizer, phases)
        return loss

    def _logits(self, batch: Batch) -> torch.Tensor:
        self.body_tokens += batch.input_ids.numel()
        with torch.autocast(self.model.device.type, self.autocast, enabled=self.autocast is not None):
            out = self.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )
        logits: torch.Tensor = out.logits.flatten(0, 1).float()
        return logits


def _chunks(groups: Sequence[Group], sequences: int) -> list[list[Group]]:
    """Groups cut into parts of so many sequences; rewards are compared over the whole group all the same."""
    parts = []
    for group in groups:
        for low in range(0, len(group.rollouts), sequences):
            rollouts = group.rollouts[low : low + sequences]
            parts.append([Group(group.index, group.prompt_ids, group.label, rollouts)])
    return parts


def agreement(ours: OurStep, reference: ReferenceStep) -> tuple[float, float]:
    """Relative difference of the losses, and the cosine between the gradients, of one update without optimiser."""
    results = []
    for contender in (reference, ours):
        module = contender.model if isinstance(contender, ReferenceStep) else contender.policy.model
        module.zero_grad()
        optimizer, contender.optimizer = contender.optimizer, None
        loss = contender.step(Phases())
        contender.optimizer = optimizer
        results.append((loss, [p.grad for p in module.parameters() if p.grad is not None]))
        module.zero_grad()
    (want, theirs), (got, mine) = results
    dot = sum(float((a.double() * b.double()).sum()) for a, b in zip(theirs, mine, strict=True))
    sizes = [sum(float(g.double().square().sum()) for g in grads) ** 0.5 for grads in (theirs, mine)]
    return abs(got - want) / max(abs(want), 1e-12), dot / (sizes[0] * sizes[1])
