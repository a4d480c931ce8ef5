"""Is the training healthy? The figure that shows trouble before the correlation does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from real_fast.reports.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    describe,
    draw_series,
    new_figure,
    save_figure,
    scale_of,
    window_for,
)

OFF_SCALE = 0.2  # mean probability off the scale that is worth a warning, in training, evaluating and judging
TRUNCATED = 0.5  # share of feedback cut off at the length limit

# Panel: (title, y axis, lines of (key, legend, colour)).
_PANELS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "Score distribution",
        "probability, nats",
        (("score/off_scale_mass", "off-scale mass", ORANGE), ("score/entropy", "entropy over the scores", BLUE)),
    ),
    (
        "Spread within a prompt's rollouts",
        "score units, share",
        (
            ("reward_group_std", "std of the reward", BLUE),
            ("advantage_std", "std of the advantage", GREEN),
            ("frac_reward_zero_std", "share of groups with zero spread", ORANGE),
        ),
    ),
    (
        "Feedback length",
        "tokens",
        (("completions/mean_length", "mean", BLUE), ("completions/max_length", "longest", GREY)),
    ),
    (
        "Truncated and forced",
        "share of rollouts",
        (
            ("completions/clipped_ratio", "cut at the length limit", ORANGE),
            ("score/forced", "phrase appended", BLUE),
        ),
    ),
    (
        "Engine against trainer",
        "nats, share of the scale",
        (
            ("sampling/sampling_logp_difference/mean", "log-probability of a token", BLUE),
            ("sampling/score_difference/mean", "expected score", ORANGE),
        ),
    ),
    (
        "Gradient and drift",
        "norm, nats per token",
        (("grad_norm", "gradient norm before clipping", BLUE), ("kl", "KL to the reference", ORANGE)),
    ),
)


def health_curves(metrics: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Six panels over the steps of a run.

    Args:
        metrics: Lines of metrics.jsonl of the training phase; a key that is missing or None draws nothing.
        path: PNG file.
    """
    window = window_for(len(metrics))
    figure, panels = new_figure(2, 3, 8.0)
    for axes, (title, unit, lines) in zip(panels.flat, _PANELS, strict=True):
        for key, name, colour in lines:
            draw_series(axes, metrics, key, name, colour, window)
        describe(axes, title, "step", unit)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9.5, frameon=False)
        else:
            axes.text(0.5, 0.5, "not measured by this method", ha="center", color=GREY, transform=axes.transAxes)
    save_figure(figure, path)


def evaluation_warnings(summary: dict[str, Any]) -> list[str]:
    """What an evaluation shows beside its correlations that its user should know, a sentence each.

    Args:
        summary: Of :func:`real_fast.evaluation.run.evaluate`; of several benchmarks, each is looked at by itself.
    """
    if several := summary.get("benchmarks"):
        return [f"{name}: {said}" for name, one in several.items() for said in evaluation_warnings(one)]
    protocol, found = summary.get("protocol", "real"), []
    off_scale, truncated = summary.get("off_scale_mass"), summary.get("truncated")
    if protocol != "decode" and off_scale is not None and off_scale > OFF_SCALE:
        found.append(
            f"off-scale mass is {off_scale:.3g}: so much of the probability is on none of the scores. Train or warm up "
            "longer, or check scale.phrase and scale.values"
        )
    # A feedback without its end: in front of a phrase that is appended, the score is read behind half a sentence.
    if protocol != "raft" and truncated is not None and truncated > TRUNCATED:
        found.append(f"{truncated:.0%} of the feedback is cut off: raise rollout.max_tokens")
    if missing := summary.get("no_score"):
        found.append(f"{missing} of {summary['n']} rows have no score, and count in no number")
    if broken := summary.get("not_finite"):
        found.append(f"the probabilities of {broken} feedbacks are not numbers: the model's weights may be broken")
    return found


def score_histogram(predictions: dict[str, list[dict[str, Any]]], path: str | Path) -> None:
    """Histogram of the expected scores beside that of the labels, a panel for each phase.

    Args:
        predictions: Rows of predictions.jsonl by phase.
        path: PNG file.

    Raises:
        ValueError: No rows at all.
    """
    scores = scale_of(predictions)
    figure, panels = new_figure(1, len(predictions), 4.2, sharey=True)
    bins = np.linspace(scores[0], scores[-1], 21)
    for axes, (phase, rows) in zip(panels.flat, predictions.items(), strict=True):
        found = np.array([r["prediction"] for r in rows if r["prediction"] is not None], dtype=float)
        labels = np.array([r["label"] for r in rows], dtype=float)
        axes.hist(labels, bins, color=GREY, alpha=0.6, label="labels")
        # Off-scale mass can push a prediction below the scale: it is counted in the first bin.
        axes.hist(np.clip(found, scores[0], scores[-1]), bins, color=BLUE, alpha=0.6, label="expected scores ŷ")
        describe(axes, phase, "score", "")
    panels[0, 0].set_ylabel("rows")
    panels[0, 0].legend(fontsize=10, frameon=False)
    save_figure(figure, path)
