"""Evaluations of a run on its held-out rows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from real_fast.config import Config
from real_fast.evaluation.run import evaluate
from real_fast.reports.health import evaluation_warnings
from real_fast.rollout.engine import RolloutEngine
from real_fast.runs.progress import progress_bar
from real_fast.runs.run import Run
from real_fast.score.scale import ScoreScale
from real_fast.types import JudgeRow

logger = logging.getLogger(__name__)


def evaluate_held_out(
    name: str,
    step: int,
    run: Run,
    engine: RolloutEngine,
    rows: list[JudgeRow],
    scale: ScoreScale,
    config: Config,
    check_stop: Callable[[], None],
) -> None:
    """Evaluate and write the result into the run's folder and log.

    Args:
        name: Of the evaluation: before, warmup, step-NNNNNN, after.
        step: Updates done.
        run: Gets the result.
        engine: Has the policy's weights.
        rows: Held-out rows.
        scale: The score scale.
        config: Of it, eval, rollout, objective.renormalize and the seed.
        check_stop: Called after every few rows; raises to stop.
    """

    def progress(done: int) -> None:
        bar.update(done)
        check_stop()

    with progress_bar(f"evaluate ({name})", len(rows), "row") as bar:
        result = evaluate(
            engine,
            rows,
            scale,
            config.eval,
            config.rollout,
            config.seed,
            progress=progress,
            renormalize=config.objective.renormalize,
        )
    if not run.writes:
        return
    run.folder.save_evaluation(name, result.summary, result.predictions)
    if name not in ("before", "after"):  # an untrained model is often off the scale; the end of a run says it by itself
        for warning in evaluation_warnings(result.summary):
            logger.warning("evaluation %s: %s", name, warning)
    run.log(record_of(name, step, result.summary))


def already_made(name: str, step: int, run: Run) -> bool:
    """Whether an interrupted run has made an evaluation, which is kept; its line in the log may be missing."""
    summary = run.folder.evaluation(name)
    if summary is None:
        return False
    if not any(line.get("name") == name for line in run.folder.metrics()):
        run.log(record_of(name, step, summary))
    return True


def record_of(name: str, step: int, summary: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    return {"phase": "eval", "name": name, "step": step, "eval": summary}
