"""What a run prints and leaves behind: summary.json, predictions.jsonl, plots."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch

from real_fast.attention.interface import describe
from real_fast.config import Config
from real_fast.data.dataset import Dataset
from real_fast.model import lora
from real_fast.model.policy import Policy
from real_fast.reports import health, html, plots
from real_fast.runs.checkpoint import TrainState
from real_fast.runs.folder import RunFolder
from real_fast.score.scale import ScoreScale
from real_fast.utils.jsonio import clean, write_json, write_jsonl
from real_fast.utils.machine import machine

PHASES = ("before", "warmup", "after")


def start(config: Config, data: Dataset, scale: ScoreScale, policy: Policy, engine: str, resumed_after: int) -> None:
    """Say what is about to run.

    Args:
        config: The settings.
        data: The rows.
        scale: The score scale.
        policy: The model.
        engine: Name of the rollout engine.
        resumed_after: The update that a resumed run goes on after; 0 for a run from its start.
    """
    device, attention = policy.device, policy.attention
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    prompts = f"shared prompts by {describe(attention)}" if attention else "a prompt per rollout"
    overlap = f"; {data.overlap} evaluation prompts are also in the training data" if data.overlap else ""
    print(
        f"model {config.model} on {where}, rollouts by {engine}, {prompts}\n"
        f"{lora.describe(policy.model)}\n"
        f"{len(data.train)} training rows, {len(data.eval)} evaluation rows, {len(data.rejected)} rejected{overlap}\n"
        f"scores {', '.join(scale.shown)} after {scale.phrase!r}; output {Path(config.output).expanduser()}"
        + (f"; resuming after step {resumed_after}" if resumed_after else ""),
        flush=True,
    )


def advance(bar: Any, record: dict[str, Any]) -> None:
    """Move a progress bar by an update and show its metrics."""
    shown = ("reward", "score/rmse") if "reward" in record else ("loss", "score/rmse")
    bar.set_postfix({name.rpartition("/")[2]: f"{record[name]:.3f}" for name in shown})
    bar.update()


def finish(
    folder: RunFolder, config: Config, state: TrainState, data: Dataset, engine: str, device: torch.device
) -> None:
    """Write the summary, the predictions and the plots, and print before and after.

    Args:
        folder: The run's; evaluations and metrics are read from it.
        config: The settings.
        state: Steps, tokens and seconds.
        data: The rows.
        engine: Name of the rollout engine.
        device: Where it ran.
    """
    names = [name for name in PHASES if folder.evaluation(name) is not None]
    evaluations = {name: folder.evaluation(name) for name in names}
    predictions = {name: folder.predictions(name) for name in names}
    metrics = folder.metrics()
    write_jsonl(folder.path / "predictions.jsonl", predictions["after"])
    real = [m for m in metrics if m["phase"] == config.method]
    tokens, rollout_seconds = state.sampled_tokens, state.seconds.get("rollout", 0.0)
    summary: dict[str, Any] = {
        "model": config.model,
        "method": config.method,
        "engine": engine,
        "seed": config.seed,
        "steps": state.step,
        "skipped_steps": state.skipped_steps,
        "train_rows": len(data.train),
        "rejected_rows": len(data.rejected),
        "eval": {name: evaluations.get(name) for name in PHASES},
        "reward": {"first": _mean(real[:3], "reward"), "last": _mean(real[-3:], "reward")},
        "kl": next((m["kl"] for m in reversed(real) if m.get("kl") is not None), None),
        "seconds": {k: round(v, 2) for k, v in state.seconds.items()},
        "sampled_tokens": tokens,
        "rollout_tokens_per_second": tokens / rollout_seconds if tokens and rollout_seconds else None,
        "peak_memory_gib": peak_memory(device),
        "machine": machine(device),
    }
    draw(folder.path, metrics, predictions)
    health.health_curves(real, folder.path / "health.png")
    health.score_histogram(predictions, folder.path / "histogram.png")
    html.write(folder.path, clean(summary), real, predictions["after"], folder.lines("rollouts.jsonl"))
    write_json(folder.path / "summary.json", clean(summary))
    print_table({name: evaluation for name, evaluation in evaluations.items() if evaluation})
    print_warnings(real, evaluations.get("after"))
    print(f"time by phase: {', '.join(f'{k} {v:.0f} s' for k, v in state.seconds.items())}")
    print(f"wrote {folder.path}/ (report.html, summary.json, predictions.jsonl, plots, final/)", flush=True)


def draw(path: Path, metrics: list[dict[str, Any]], predictions: dict[str, list[dict[str, Any]]]) -> None:
    """All plots of a run."""
    real = [m for m in metrics if m["phase"] != "warmup"]
    plots.training_curves(real, path / "training.png", [m for m in metrics if m["phase"] == "warmup"])
    plots.before_after(predictions, path / "before_after.png")
    plots.calibration_plot(predictions, path / "calibration.png")


def print_table(evaluations: dict[str, dict[str, Any]]) -> None:
    """Before and after, side by side; of several benchmarks their average, and each below it."""
    lines = [
        line
        for name, e in evaluations.items()
        for line in [(name, e), *((f"  {benchmark}", one) for benchmark, one in e.get("benchmarks", {}).items())]
    ]
    width = max(14, 2 + max(len(name) for name, _ in lines))
    print(
        f"\n{'held-out rows':<{width}}{'n':>5}{'Pearson':>26}{'Spearman':>10}{'Kendall':>9}{'RMSE':>7}{'no score':>10}"
    )
    for name, e in lines:
        interval = (e.get("ci95") or {}).get("pearson")
        pearson = _number(e["pearson"]) + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")
        print(
            f"{name:<{width}}{e['n']:>5}{pearson:>26}{_number(e['spearman']):>10}{_number(e['kendall']):>9}"
            f"{_number(e['rmse'], 2):>7}{e['no_score']:>10}"
        )
    protocols = sorted({e.get("protocol", "real") for e in evaluations.values()})
    average = "; a phase's line is the benchmarks' plain average" if len(lines) > len(evaluations) else ""
    print(f"(protocol {', '.join(protocols)}; 95 % intervals by resampling prompts{average})")


def print_warnings(metrics: list[dict[str, Any]], after: dict[str, Any] | None) -> None:
    """What the report warns of, and the last evaluation, where who reads no report sees it.

    Args:
        metrics: Lines of the training phase.
        after: The summary of the last evaluation.
    """
    for warning in [*html.health_warnings(metrics), *(health.evaluation_warnings(after) if after else ())]:
        print(f"warning: {warning}")


def peak_memory(device: torch.device) -> float:
    """Peak memory in GiB: of the GPU's allocator on CUDA, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS and in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _mean(metrics: list[dict[str, Any]], key: str) -> float | None:
    values = [m[key] for m in metrics if m.get(key) is not None]
    return sum(values) / len(values) if values else None
