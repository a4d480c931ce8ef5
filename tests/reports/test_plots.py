from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from real_fast.evaluation.metrics import summarize
from real_fast.reports import plots


def rows(n: int = 40, seed: int = 0, missing: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    found: list[dict[str, Any]] = []
    for i in range(n):
        p = 0.9 * rng.dirichlet(np.ones(5))
        found.append(
            {
                "id": str(i),
                "prompt_id": str(i // 4),
                "label": float(rng.integers(3, 16)) / 3,
                "prediction": None if i < missing else float(p @ np.arange(1, 6)),
                "distribution": None if i < missing else {str(k + 1): float(v) for k, v in enumerate(p)},
            }
        )
    return found


def metrics(steps: int) -> list[dict[str, Any]]:
    some = rows()
    summary = summarize([r["prediction"] for r in some], [r["label"] for r in some], [r["prompt_id"] for r in some], 20)
    nothing = summarize([None] * 4, [1.0] * 4, list("abcd"), 20)
    lines: list[dict[str, Any]] = [{"step": 0, "eval": nothing}, {"step": 0, "eval": summary}]
    for t in range(1, steps + 1):
        pearson = None if t == 2 else 0.1 * t
        lines.append({"step": t, "reward": -2.0 + t, "score/rmse": 1.0, "score/mae": 0.8, "score/pearson": pearson})
    return [*lines, {"step": steps, "eval": nothing}]


def size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG file, which must show something."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(np.unique(plt.imread(path).reshape(-1, 4), axis=0)) > 20  # not an empty page
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.mark.parametrize(("steps", "warmup"), [(0, 0), (1, 0), (3, 12), (40, 1)])
def test_training_curves(tmp_path: Path, steps: int, warmup: int) -> None:
    path = tmp_path / "t.png"
    plots.training_curves(metrics(steps), path, [{"step": t + 1, "loss": 1 / (t + 1)} for t in range(warmup)])
    assert size(path)[0] == 1200
    assert list(tmp_path.iterdir()) == [path]


def test_the_later_evaluation_at_a_step_is_drawn_with_its_interval() -> None:
    axes = plots.new_figure(1, 1, 4.0)[1][0, 0]
    lines = [{"step": 0, "eval": {"rmse": 9.0}}, *metrics(3)[1:]]
    plots._evaluations(axes, lines, "rmse", "held out")
    summary = lines[1]["eval"]
    (container,) = axes.containers
    assert container[0].get_xydata().tolist() == [[0.0, summary["rmse"]]]  # step 3 has nothing to show
    (bars,) = container[2]
    assert bars.get_segments()[0][:, 1].tolist() == pytest.approx(summary["ci95"]["rmse"])


def test_a_number_measured_once_is_drawn_as_a_point() -> None:
    _, panels = plots.new_figure(1, 1, 4.0)
    plots.draw_series(
        panels[0, 0], [{"step": t, "kl": 0.1 if t == 20 else None} for t in range(1, 21)], "kl", "KL", "b", 5
    )
    assert panels[0, 0].get_lines()[0].get_marker() == "."
    plt.close("all")


def test_smoothing_is_a_centred_mean() -> None:
    y = np.array([1.0, 2.0, 6.0, 3.0, 5.0])
    assert plots.smooth(y, 3).tolist() == pytest.approx([1.5, 3.0, 11 / 3, 14 / 3, 4.0])
    assert plots.smooth(y, 1).tolist() == y.tolist()
    assert [plots.window_for(n) % 2 for n in (1, 8, 60, 61, 200)] == [1] * 5


@pytest.mark.parametrize("draw", [plots.before_after, plots.calibration_plot])
def test_prediction_plots(tmp_path: Path, draw: Any) -> None:
    path = tmp_path / "p.png"
    draw({"before": rows(seed=1, missing=5), "warmup": rows(seed=2), "after": rows(missing=40)}, path)
    assert size(path)[0] == 1200
    draw({"bench.jsonl": rows(3)}, path)
    assert size(path)[0] == 700
    with pytest.raises(ValueError, match="no predictions"):
        draw({"before": []}, path)


def test_scores_are_the_scale_and_not_only_what_occurs() -> None:
    some = rows(6, missing=2)
    for row in some:
        row["label"] = 2.0
    assert plots.scale_of({"after": some}) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert plots.scale_of({"after": some[:2]}) == [2.0]


def test_plots_leave_pyplot_alone(tmp_path: Path) -> None:
    before = plt.get_fignums()
    plots.before_after({"after": rows()}, tmp_path / "p.png")
    assert plt.get_fignums() == before
