"""The figures of a run: pure functions from numbers to PNG files, 1200 pixels wide (700 for a single panel)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from real_fast.evaluation.metrics import calibration, correlations
from real_fast.utils import files

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
_DPI = 100
_TITLES = {"before": "Before training", "warmup": "After the warm-up", "after": "After training"}


def training_curves(
    metrics: Sequence[dict[str, Any]], path: str | Path, warmup_metrics: Sequence[dict[str, Any]] = ()
) -> None:
    """Reward, error of the expected score and Pearson over the steps; the loss of the warm-up where there is one.

    Args:
        metrics: Lines of metrics.jsonl: ``step``, ``reward``, ``score/rmse``, ``score/mae``, ``score/pearson`` (each
            may be None or missing), and ``eval`` (an evaluation's summary) where there was
            one; of two at one step, such as before and after the warm-up, the later one is drawn.
        path: PNG file.
        warmup_metrics: Lines of the warm-up: ``step`` and ``loss``.
    """
    window = window_for(sum("score/rmse" in m for m in metrics))
    figure, panels = new_figure(2, 2, 8.6) if warmup_metrics else new_figure(1, 3, 4.9)
    *warmup, reward, error, pearson = panels.flat
    if warmup_metrics:
        draw_series(warmup[0], warmup_metrics, "loss", "loss", BLUE, window_for(len(warmup_metrics)))
        describe(warmup[0], "Warm-up: cross-entropy on given feedback", "warm-up step", "loss (nats per token)")
    if any("reward" in m for m in metrics) or not any("loss" in m for m in metrics):
        draw_series(reward, metrics, "reward", "training batch", BLUE, window)
        describe(reward, "Reward", "step", "mean reward")
    else:  # a method that trains on given feedback
        draw_series(reward, metrics, "loss", "training batch", BLUE, window)
        describe(reward, "Loss", "step", "loss")
    draw_series(error, metrics, "score/rmse", "RMSE, training batch", BLUE, window)
    draw_series(error, metrics, "score/mae", "MAE, training batch", GREEN, window)
    _evaluations(error, metrics, "rmse", "RMSE, held-out prompts")
    describe(error, "Error of the expected score ŷ", "step", "error (score units)")
    draw_series(pearson, metrics, "score/pearson", "training batch", BLUE, window)
    _evaluations(pearson, metrics, "pearson", "held-out prompts")
    describe(pearson, "Correlation of ŷ and label", "step", "Pearson r")
    columns = 2 if warmup_metrics else 1
    for axes in (error, pearson):
        if axes.get_legend_handles_labels()[0]:  # below the axes, where it hides no point
            axes.legend(fontsize=10.5, frameon=False, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    for axes in panels.flat:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    reward.sharex(error)
    pearson.sharex(error)
    thick = f"thick: mean of {window} steps; " if window > 1 else ""
    figure.supxlabel(f"thin: every step; {thick}diamonds: evaluations with 95 % intervals", fontsize=10.5, color=GREY)
    save_figure(figure, path)


def before_after(predictions: dict[str, list[dict[str, Any]]], path: str | Path) -> None:
    """Predicted against true score, a panel for each phase.

    Args:
        predictions: Rows of predictions.jsonl by phase ("before", "warmup", "after", or any title), in this order.
        path: PNG file.

    Raises:
        ValueError: No rows at all.
    """
    scores = scale_of(predictions)
    figure, panels = new_figure(1, len(predictions), 5.0 if len(predictions) > 1 else 6.5, sharey=True)
    low, high = scores[0], scores[-1]
    jitter = np.random.default_rng(0)
    for axes, (phase, rows) in zip(panels.flat, predictions.items(), strict=True):
        scored = [r for r in rows if r["prediction"] is not None]
        x = np.array([r["label"] for r in scored], dtype=float)
        y = np.array([r["prediction"] for r in scored], dtype=float)
        width = 0.02 * (high - low)
        axes.plot([low, high], [low, high], color=GREY, linewidth=1.3, linestyle="--", label="perfect")
        moved = x + jitter.uniform(-width, width, len(x))
        axes.scatter(moved, y, s=24, alpha=0.45, color=BLUE, linewidths=0, label="one row")
        near = _nearest(x, scores)
        at = [i for i in range(len(scores)) if (near == i).any()]
        means = [y[near == i].mean() for i in at]
        mean: dict[str, Any] = {"color": ORANGE, "marker": "_", "linewidths": 2.6}
        axes.scatter([scores[i] for i in at], means, s=620, **mean)
        axes.scatter([], [], s=200, label="mean by label", **mean)
        axes.set_xlim(low - 0.1 * (high - low), high + 0.1 * (high - low))
        axes.set_xticks(scores)
        found = correlations(y, x)
        without = f", {len(rows) - len(scored)} without a score" if len(scored) < len(rows) else ""
        numbers = f"Pearson {_number(found['pearson'])}, RMSE {_number(found['rmse'])}"
        describe(axes, f"{_TITLES.get(phase, phase)}\n{numbers}\n({len(rows)} rows{without})", "true score (label)", "")
    panels[0, 0].set_ylabel("predicted score ŷ")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    save_figure(figure, path)


def calibration_plot(predictions: dict[str, list[dict[str, Any]]], path: str | Path) -> None:
    """Does a predicted score mean what it says? A column for each phase.

    Above, the mean label of rows with about the same expected score (95 % intervals; the diagonal is calibrated).
    Below, the probability that each score gets on average, beside how often it is the label.

    Args:
        predictions: Rows of predictions.jsonl by phase ("before", "warmup", "after", or any title), in this order.
        path: PNG file.

    Raises:
        ValueError: No rows at all.
    """
    scores = scale_of(predictions)
    figure, panels = new_figure(2, len(predictions), 8.0, sharey="row", height_ratios=[3, 2])
    for column, (phase, rows) in enumerate(predictions.items()):
        scored = [r for r in rows if r["distribution"] is not None]
        p = np.array([list(r["distribution"].values()) for r in scored], dtype=float)
        labels = np.array([r["label"] for r in scored], dtype=float)
        error = _calibration_panel(panels[0, column], p, labels, scores)
        title = f"{_TITLES.get(phase, phase)}\ncalibration error {_number(error)}"
        describe(panels[0, column], title, "predicted score ŷ (mean of the bin)", "")
        if scored:
            _share_panel(panels[1, column], p, labels, scores, list(scored[0]["distribution"]))
        describe(panels[1, column], "", "score", "")
    panels[0, 0].set_ylabel("mean label (score units)")
    panels[1, 0].set_ylabel("share of rows, probability")
    panels[1, 0].set_ylim(0, 1.3 * panels[1, 0].get_ylim()[1])  # room for the legend
    if panels[1, 0].get_legend_handles_labels()[0]:
        panels[1, 0].legend(loc="upper left", fontsize=10.5, ncols=2)
    save_figure(figure, path)


def smooth(y: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred running mean of `window` (odd) values, over fewer at both ends; [n] to [n]."""
    half = window // 2
    return np.array([y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))])


def _calibration_panel(
    axes: Axes, p: NDArray[np.float64], labels: NDArray[np.float64], scores: list[float]
) -> float | None:
    found = calibration(p, scores, labels)
    bins, ends = found["bins"], [scores[0], scores[-1]]
    axes.plot(ends, ends, color=GREY, linewidth=1.3, linestyle="--", label="calibrated")
    if bins:
        sizes = sorted({b["n"] for b in bins})
        rows = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
        x, y = [b["predicted"] for b in bins], [b["label"] for b in bins]
        spread = [1.96 * (b["label_se"] or 0.0) for b in bins]
        axes.errorbar(x, y, yerr=spread, fmt="o-", color=BLUE, elinewidth=1.3, capsize=3, label=f"bins of {rows} rows")
        ends = [min(ends[0], *x), max(ends[1], *x)]
    margin = 0.08 * (ends[1] - ends[0])
    axes.set_xlim(ends[0] - margin, ends[1] + margin)
    axes.legend(loc="upper left", fontsize=10.5)
    error: float | None = found["error"]
    return error


def _share_panel(
    axes: Axes, p: NDArray[np.float64], labels: NDArray[np.float64], scores: list[float], texts: list[str]
) -> None:
    share = np.bincount(_nearest(labels, scores), minlength=len(scores)) / len(labels)
    off_scale = max(0.0, 1.0 - float(p.sum(axis=1).mean()))
    at = np.arange(len(scores) + 1)
    axes.bar(at[:-1] - 0.2, share, 0.4, color=GREY, label="labels")
    axes.bar(at + 0.2, [*p.mean(axis=0), off_scale], 0.4, color=ORANGE, label="model")
    axes.set_xticks(at, [*texts, "other"])


def draw_series(axes: Axes, lines: Sequence[dict[str, Any]], key: str, label: str, color: str, window: int) -> None:
    """A thin raw line and a thick smoothed one; the lines go on over steps without the number."""
    points = [(m["step"], m[key]) for m in lines if m.get(key) is not None]
    if not points:
        return
    x, y = np.array(points, dtype=float).T
    window = window if len(points) >= window else 1  # a number that is measured now and then, such as the KL
    axes.plot(x, y, color=color, linewidth=0.9, alpha=0.45, marker="." if window == 1 else None)
    axes.plot(x, smooth(y, window), color=color, linewidth=2.3, label=label)


def _evaluations(axes: Axes, lines: Sequence[dict[str, Any]], key: str, label: str) -> None:
    """Evaluations on held-out prompts, with their 95 % intervals where there are any."""
    latest = {m["step"]: m["eval"] for m in lines if m.get("eval")}
    found = {step: summary for step, summary in latest.items() if summary.get(key) is not None}
    if not found:
        return
    x, y = list(found), np.array([e[key] for e in found.values()])
    ends = np.array([e.get("ci95", {}).get(key) or [e[key], e[key]] for e in found.values()])
    spread = np.clip(np.stack([y - ends[:, 0], ends[:, 1] - y]), 0, None)
    style: dict[str, Any] = {"color": ORANGE, "markersize": 6, "capsize": 4, "elinewidth": 1.6, "zorder": 5}
    axes.errorbar(x, y, yerr=spread, fmt="D", label=label, **style)


def window_for(n: int) -> int:
    """Odd width of the smoothing: a tenth of the run and at least 5 steps; 1 for a run that is shorter than that."""
    return 1 if n < 8 else max(5, n // 10) | 1


def _nearest(labels: NDArray[np.float64], scores: list[float]) -> NDArray[np.intp]:
    """[n] index of the score nearest to each label."""
    return np.asarray(np.abs(labels[:, None] - np.asarray(scores)[None, :]).argmin(axis=1))


def scale_of(predictions: dict[str, list[dict[str, Any]]]) -> list[float]:
    """The scale, ascending; the labels where no row has a distribution."""
    rows = [r for phase in predictions.values() for r in phase]
    scores = {float(t) for r in rows for t in r["distribution"] or ()} or {float(r["label"]) for r in rows}
    if not scores:
        raise ValueError("there are no predictions to plot")
    return sorted(scores)


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}".replace("-", "−")


def new_figure(rows: int, columns: int, height: float, **shared: Any) -> tuple[Figure, Any]:
    """A figure of one width in this project, and its panels [rows, columns]."""
    figure = Figure(figsize=(12.0 if columns > 1 else 7.0, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def describe(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, names of the axes, a light grid."""
    axes.set_title(title, fontsize=13)
    axes.set_xlabel(x, fontsize=12)
    axes.set_ylabel(y, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.25, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG, whole or not at all."""
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)
