"""Floating-point operations of an update, counted from the model's config: what a gain should be before it is measured.

Two operations per multiply-add. Matrix products and attention scores are counted; what is left is memory traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from real_fast.types import Group

# A prompt's tokens, and of each of its rollouts the tokens in the context and those that were sampled.
Lengths = tuple[int, Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class UpdateFlops:
    """Operations of one update: ours, and the reference-style one (two forward passes, full logits, no sharing)."""

    ours: float
    reference: float

    @property
    def ratio(self) -> float:
        """The speed-up that the count predicts where both run at the same rate."""
        return self.reference / self.ours


@dataclass(frozen=True)
class ModelFlops:
    """Sizes that the counts follow from.

    Attributes:
        body: Weights of the body's matrices; one multiply-add per weight and token.
        attention: Layers times heads times head size: two multiply-adds of it per query and key.
        head: Weights of the lm_head.
        window: Positions that a token sees, or None for all.
    """

    body: int
    attention: int
    head: int
    window: int | None = None

    @classmethod
    def of(cls, config: Any) -> ModelFlops:
        """From a Transformers config, without weights. Raises ValueError for mixtures of experts and convolutions."""
        from real_fast.planning import count

        return cls(**count.matrices(config))

    def forward(self, spans: Sequence[tuple[int, int]]) -> float:
        """One forward pass of the body over spans of tokens, each behind so many tokens that it sees too."""
        tokens = sum(length for length, _ in spans)
        seen = 0.0
        for length, before in spans:
            if self.window is None:
                seen += length * before + length * (length + 1) / 2
            else:
                seen += sum(min(before + i + 1, self.window) for i in range(length))
        return 2.0 * self.body * tokens + 4.0 * self.attention * seen

    def update(
        self,
        groups: Sequence[Group],
        shared_prompt: bool = True,
        recompute: bool = False,
        kl: bool = False,
        iterations: int = 1,
        adapters: int = 0,
    ) -> UpdateFlops:
        """One update over groups of rollouts, as :meth:`update_of` has it."""
        lengths = [(len(g.prompt_ids), [(len(r.context_ids), len(r.sampled_ids)) for r in g.rollouts]) for g in groups]
        return self.update_of(lengths, shared_prompt, recompute, kl, iterations, adapters)

    def update_of(
        self,
        groups: Sequence[Lengths],
        shared_prompt: bool = True,
        recompute: bool = False,
        kl: bool = False,
        iterations: int = 1,
        adapters: int = 0,
    ) -> UpdateFlops:
        """One update over groups of rollouts.

        Args:
            groups: The lengths of each group.
            shared_prompt: Whether ours shares prompts.
            recompute: Activation checkpointing on both sides: one more forward pass of the body.
            kl: The KL to a reference on both sides: one forward pass without gradients, body and head.
            iterations: Optimiser steps on the same rollouts.
            adapters: On both sides, parameters of adapters, which alone are trained: nothing is multiplied for the
                gradient of the other weights. 0 where all are.
        """
        alone, shared, rows, tokens = [], [], 0, 0
        for p, rollouts in groups:
            shared.append((p, 0))
            for r, sampled in rollouts:
                alone.append((p + r, 0))
                shared.append((r, p))
                rows += sampled + 1
                tokens += p + r
        # Forward, and twice as much backward: for the gradient of what went in, and for the weights'.
        backward = 1 if adapters else 2
        passes = 1 + backward + recompute
        separate = self.forward(alone) + 2.0 * adapters * tokens
        once = self.forward(shared) + 2.0 * adapters * sum(n for n, _ in shared) if shared_prompt else separate
        of_adapters = 2.0 * adapters * (sum(n for n, _ in shared) if shared_prompt else tokens)
        # Where a row's coefficient depends on its log-probability, the backward pass computes its logits again.
        products = 1 + backward + (kl or iterations > 1)
        ours = iterations * (passes * once + of_adapters + products * 2.0 * self.head * rows)
        # The forward pass for the scores is made once for all iterations.
        reference = (iterations * passes + 1) * separate + iterations * 2.0 * adapters * tokens
        reference += (iterations * (1 + backward) + 1) * 2.0 * self.head * tokens
        if kl:
            ours += once + 2.0 * self.head * rows
            reference += separate + 2.0 * self.head * tokens
        return UpdateFlops(ours, reference)
