"""Some rollouts of an update as lines of rollouts.jsonl, for people who want to see what the numbers are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from real_fast.score.scale import ScoreScale
from real_fast.score.spelling import Spelling
from real_fast.training.step_metrics import StepMetrics


def rollout_lines(
    metrics: StepMetrics, step: int, prompts: int, scale: ScoreScale, tokenizer: Any
) -> Iterator[dict[str, Any]]:
    """A line per rollout of the update's first prompts, in their order.

    Args:
        metrics: Of the update.
        step: Updates done, this one included.
        prompts: How many prompts.
        scale: The score scale.
        tokenizer: Decodes what has no text of its own: given answers, and what the trainer sampled.

    Yields:
        step, id (of the row), rollout (its place among the prompt's), text, finish, forced_tokens, label,
        expected_score, distribution {score text: probability, full softmax}, off_scale_mass, reward and advantage (None
        for a method without). Scores are None where the rollout has none.
    """
    if not prompts:
        return
    place: Counter[int] = Counter()
    spelling = Spelling(tokenizer)
    found = []
    for batch, out in metrics.batches:
        p = out.score_logprobs.float().exp().cpu()
        columns = {
            "label": batch.labels.float().cpu(),
            "expected_score": out.expected_score.float().cpu(),
            "reward": None if out.rewards is None else out.rewards.float().cpu(),
            "advantage": None if out.advantages is None else out.advantages.float().cpu(),
        }
        for i, g in enumerate(batch.group.tolist()):
            number = place[g]
            place[g] += 1
            if g >= prompts:
                continue
            group = metrics.groups[g]
            rollout = group.rollouts[number]
            values = {key: None if column is None else float(column[i]) for key, column in columns.items()}
            shown = dict(zip(scale.names, p[i].tolist(), strict=True))
            if not rollout.has_score:
                values |= dict.fromkeys(("expected_score", "reward", "advantage"))
            found.append(
                {
                    "step": step,
                    "id": group.row_id,
                    "rollout": number,
                    "text": rollout.text or spelling.text(rollout.context_ids),
                    "finish": rollout.finish,
                    "forced_tokens": rollout.n_forced,
                    **values,
                    "distribution": shown if rollout.has_score else None,
                    "off_scale_mass": 1 - float(p[i].sum()) if rollout.has_score else None,
                    "_order": (g, number),
                }
            )
    yield from sorted(found, key=lambda line: line.pop("_order"))
