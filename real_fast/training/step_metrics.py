"""Metrics of one update; names follow TRL where TRL has the thing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch

from real_fast.distributed.world import ALONE, World
from real_fast.evaluation.metrics import correlations
from real_fast.methods.base import LossOutput
from real_fast.rollout.agreement import EngineGap, gap
from real_fast.score.scale import ScoreScale
from real_fast.types import Batch, Group
from real_fast.utils.flat import flat


@dataclass
class Seen:
    """What is kept of a micro-batch.

    Attributes:
        group: [M] int64, the group's place in the update.
        labels: [M] float32.
        rollout_valid: [M] bool.
        tokens: That went through the body, padding included.
        padding: Of these, not yet read from the device; None for a packed row.
    """

    group: torch.Tensor
    labels: torch.Tensor
    rollout_valid: torch.Tensor
    tokens: int
    padding: torch.Tensor | None

    @classmethod
    def of(cls, batch: Batch) -> Seen:
        """Of a micro-batch."""
        padding = None if batch.attention_mask is None else (batch.attention_mask == 0).sum()
        return cls(batch.group, batch.labels, batch.rollout_valid, batch.input_ids.numel(), padding)


class StepMetrics:
    """Gathers what the micro-batches of one update return; with several iterations on its rollouts, of the first.

    Of several ranks, each has the metrics of all: what their micro-batches returned is exchanged once an update.

    Args:
        groups: The update's groups, of all ranks.
        scale: The score scale.
        world: The ranks; they call :meth:`compare_engine` and :meth:`result` together.
    """

    def __init__(self, groups: Sequence[Group], scale: ScoreScale, world: World = ALONE) -> None:
        self.groups = groups
        self.scale = scale
        self.world = world
        self.rollouts = [r for g in groups for r in g.rollouts]
        self.batches: list[tuple[Seen, LossOutput]] = []
        self.further: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.weights: list[torch.Tensor] = []
        self.engine_gap: EngineGap | None = None
        self._own: list[tuple[Batch, LossOutput]] = []
        self._exchanged = world.size == 1

    @property
    def sampled_tokens(self) -> int:
        """Tokens that the model sampled in this update (or that were given)."""
        return sum(len(r.sampled_ids) for r in self.rollouts)

    @property
    def num_tokens(self) -> int:
        """Tokens of this update's sequences, each with its prompt and as it was trained on, as TRL counts them."""
        return sum(len(g.prompt_ids) + len(r.input_ids) for g in self.groups for r in g.rollouts)

    @property
    def finite(self) -> bool:
        """Whether every micro-batch's loss is a number."""
        self._exchange()
        return bool(torch.stack([out.loss for _, out in self.batches]).isfinite().all())

    def add(self, batch: Batch, out: LossOutput, iteration: int) -> LossOutput:
        """Keep a micro-batch's small tensors; nothing is copied to the host yet.

        Of iterations after the first, probability ratios and where the clip was active are kept.

        Returns:
            What the first iteration returned for this micro-batch.
        """
        if out.weights is not None:
            self.weights.append(out.weights[batch.rollout_valid])
        if iteration == 0:
            out.loss = out.loss.detach()
            self._own.append((batch, out))
            if not batch.placeholder:
                self.batches.append((Seen.of(batch), out))
            return out
        assert out.ratio is not None and out.clipped is not None
        if not batch.placeholder:
            self.further.append((out.ratio, out.clipped))
        return next(first for own, first in self._own if own is batch)

    def _exchange(self) -> None:
        """Of several ranks: what the others' micro-batches of the first iteration returned."""
        if not self._exchanged:
            self.batches = [one for some in self.world.gather(_on_cpu(self.batches)) for one in some]
            self._exchanged = True

    def gather(self, name: str) -> torch.Tensor:
        """A field of every output, of the rollouts (or rows) in micro-batch order, on the CPU."""
        return torch.cat([getattr(out, name) for _, out in self.batches]).float().cpu()

    def of_batches(self, name: str) -> torch.Tensor:
        """The same for a field of the batches."""
        return torch.cat([getattr(batch, name) for batch, _ in self.batches]).cpu()

    def compare_engine(self) -> EngineGap:
        """Engine against trainer on the rollouts of this update, over the rows that went through the head."""
        self._exchange()
        seen: Counter[int] = Counter()
        rollouts = []
        for g in self.of_batches("group").tolist():
            rollouts.append(self.groups[g].rollouts[seen[g]])
            seen[g] += 1
        scores = [r.score_logprobs for r in rollouts]
        with_scores = torch.tensor([some is not None for some in scores])
        self.engine_gap = gap(
            flat((r.sampled_logprobs for r in rollouts), torch.float64),
            self.gather("logprobs"),
            self.gather("computed").bool(),
            flat((some for some in scores if some is not None), torch.float64),
            self.gather("score_logprobs")[with_scores],
            self.scale,
        )
        return self.engine_gap

    def part(self, name: str) -> float:
        """One part of the update's loss."""
        return float(sum(out.parts[name] for _, out in self.batches))

    def rewards(self, valid: torch.Tensor, group: torch.Tensor) -> dict[str, float]:
        """Of rollouts; nothing for a method without rewards."""
        if self.batches[0][1].rewards is None:
            return {}
        reward, advantage = self.gather("rewards")[valid], self.gather("advantages")[valid]
        order, sizes = group.argsort(stable=True), group.unique(return_counts=True)[1]
        groups = reward[order].split(sizes.tolist())
        spread = torch.stack([one.std(correction=0) for one in groups]) if len(group) else torch.zeros(1)
        return {
            "reward": _mean(reward),
            "reward_std": float(reward.std()) if len(reward) > 1 else float("nan"),
            "reward_group_std": _mean(spread),
            "frac_reward_zero_std": _mean((spread < 1e-6).float()),
            "advantage_abs": _mean(advantage.abs()),
            "advantage_std": float(advantage.std(correction=0)) if len(advantage) else float("nan"),
        }

    def proximity(self) -> dict[str, float]:
        """How far the policy is from the reference and, after the first iteration, from the rollouts' own policy."""
        found: dict[str, float] = {}
        if self.batches[0][1].kl is not None:
            found["kl"] = _mean(self.gather("kl"))
        if self.further:
            ratio = torch.cat([ratio for ratio, _ in self.further]).cpu()
            clipped = int(torch.cat([clipped for _, clipped in self.further]).sum())
            # A token whose advantage is 0 is never clipped, and counts all the same.
            tokens = sum(len(r.sampled_ids) for r in self.rollouts if r.has_score)
            iterations = len(self.further) // len(self.batches)
            found["clip_ratio/region_mean"] = clipped / (iterations * tokens) if tokens else float("nan")
            found["ratio/mean"] = _mean(ratio)
        if self.weights and len(weights := torch.cat(self.weights).cpu()):
            name = "sampling/importance_sampling_ratio"  # TRL's, of rollouts, as cut
            found |= {f"{name}/mean": _mean(weights), f"{name}/max": float(weights.max())}
            found[f"{name}/min"] = float(weights.min())
        return found

    def histogram(self, name: str, values: torch.Tensor) -> dict[str, float]:
        """Shares of `values` by the nearest score of the scale, the lower one of two; trackers take numbers alone."""
        nearest = (values[:, None] - self.scale.values_tensor()).abs().argmin(1)
        return {f"{name}/share/{text}": _mean(nearest == place) for place, text in enumerate(self.scale.names)}

    def result(self) -> dict[str, Any]:
        """One flat dictionary of numbers; a correlation that is not defined is None."""
        self._exchange()
        if self.engine_gap is None and self.batches[0][1].rewards is not None:  # of rollouts: an engine sampled them
            self.compare_engine()
        if self.world.size > 1:
            self.further = [one for some in self.world.gather(_on_cpu(self.further)) for one in some]
            self.weights = [one for some in self.world.gather(_on_cpu(self.weights)) for one in some]
        valid = self.of_batches("rollout_valid")
        y_hat, label = self.gather("expected_score")[valid], self.of_batches("labels")[valid]
        group, off = self.of_batches("group")[valid], self.gather("off_scale_mass")[valid]
        # Over the scores alone: with most of the mass off the scale, even a flat distribution would look like a point.
        among_scores = self.gather("score_logprobs")[valid].clamp(min=-1e4).log_softmax(1)
        computed, logp = self.gather("computed").bool(), self.gather("logprobs")
        lengths = torch.tensor([len(r.sampled_ids) for r in self.rollouts], dtype=torch.float32)
        clipped = torch.tensor([r.finish == "length" for r in self.rollouts])
        error = y_hat - label
        finite = torch.isfinite(y_hat)  # a step whose loss is not finite is skipped, and still logged
        agreement = correlations(y_hat[finite].tolist(), label[finite].tolist(), ("pearson",))
        tokens = sum(b.tokens for b, _ in self.batches)
        padded = [b.padding for b, _ in self.batches if b.padding is not None]
        padding = int(torch.stack(padded).sum()) if padded else 0
        return {
            "loss": float(sum(out.loss for _, out in self.batches)),
            **{f"loss/{name}": self.part(name) for name in self.batches[0][1].parts},
            **self.rewards(valid, group),
            **self.proximity(),
            **self.histogram("score", y_hat[finite]),
            **self.histogram("label", label),
            "score/rmse": _mean(error**2) ** 0.5,
            "score/mae": _mean(error.abs()),
            "score/bias": _mean(error),
            "score/pearson": agreement["pearson"],
            "score/expected_mean": _mean(y_hat),
            "score/label_mean": _mean(label),
            "score/entropy": _mean(-(among_scores.exp() * among_scores).sum(1)),
            "score/off_scale_mass": _mean(off),
            "score/no_score": int((~valid).sum()),
            "score/forced": _mean(torch.tensor([r.finish != "phrase" for r in self.rollouts]).float()),
            "nll": _mean(-logp[computed]),
            "completions/mean_length": _mean(lengths),
            "completions/min_length": float(lengths.min()),
            "completions/max_length": float(lengths.max()),
            "completions/clipped_ratio": _mean(clipped.float()),
            "completions/mean_terminated_length": _mean(lengths[~clipped]),
            "head/rows": int(computed.sum()) + len(valid),
            "head/rows_dropped": int((~computed).sum()),
            "body/tokens": tokens,
            "body/padding": padding / tokens,
            "body/prompt_tokens_saved": self.num_tokens - (tokens - padding),
            **(self.engine_gap.metrics() if self.engine_gap else {}),
        }


def _on_cpu(found: Any) -> Any:
    """The same, nested in lists, tuples, dictionaries and dataclasses, with tensors on the CPU."""
    if isinstance(found, torch.Tensor):
        return found.detach().cpu()
    if isinstance(found, list | tuple):
        return type(found)(map(_on_cpu, found))
    if isinstance(found, dict):
        return {key: _on_cpu(value) for key, value in found.items()}
    if is_dataclass(found) and not isinstance(found, type):
        return replace(found, **{name: _on_cpu(value) for name, value in vars(found).items()})
    return found


def _mean(x: torch.Tensor) -> float:
    return float(x.float().mean()) if x.numel() else float("nan")
