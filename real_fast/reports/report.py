"""What a run prints and leaves behind: summary.json, predictions.jsonl, plots."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from real_fast.attention.interface import describe
from real_fast.reports import health, html, plots
from real_fast.utils.jsonio import clean, write_json, write_jsonl
from real_fast.utils.machine import machine

if TYPE_CHECKING:
    from real_fast.train import Trainer

PHASES = ("before", "warmup", "after")


def start(trainer: Trainer) -> None:
    """Say what is about to run."""
    config, data = trainer.config, trainer.data
    device = (
        torch.cuda.get_device_name() if trainer.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    attention = trainer.policy.attention
    prompts = f"shared prompts by {describe(attention)}" if attention else "a prompt per rollout"
    overlap = f"; {data.overlap} evaluation prompts are also in the training data" if data.overlap else ""
    print(
        f"model {config.model} on {device}, rollouts by {trainer.engine.name}, {prompts}\n"
        f"{len(data.train)} training rows, {len(data.eval)} evaluation rows, {len(data.rejected)} rejected{overlap}\n"
        f"scores {', '.join(trainer.scale.texts)} after {trainer.scale.phrase!r}; output {trainer.folder.path}"
        + (f"; resuming after step {trainer.state.step}" if trainer.found else ""),
        flush=True,
    )
    if config.method == "raft" and config.supervised.feedback == "none" and config.eval.protocol != "raft":
        print(
            f"eval.protocol is {config.eval.protocol}: the evaluations let the model write feedback, which it does not "
            "learn here; raft reads the score right behind the phrase",
            file=sys.stderr,
        )


def finish(trainer: Trainer) -> None:
    """Write the summary, the predictions and the plots, and print before and after."""
    folder, state = trainer.folder, trainer.state
    names = [name for name in PHASES if folder.evaluation(name) is not None]
    evaluations = {name: folder.evaluation(name) for name in names}
    predictions = {name: folder.predictions(name) for name in names}
    metrics = folder.metrics()
    write_jsonl(folder.path / "predictions.jsonl", predictions["after"])
    real = [m for m in metrics if m["phase"] == trainer.config.method]
    tokens, rollout_seconds = state.sampled_tokens, state.seconds.get("rollout", 0.0)
    summary: dict[str, Any] = {
        "model": trainer.config.model,
        "method": trainer.config.method,
        "engine": trainer.engine.name,
        "seed": trainer.config.seed,
        "steps": state.step,
        "skipped_steps": state.skipped_steps,
        "train_rows": len(trainer.data.train),
        "rejected_rows": len(trainer.data.rejected),
        "eval": {name: evaluations.get(name) for name in PHASES},
        "reward": {"first": _mean(real[:3], "reward"), "last": _mean(real[-3:], "reward")},
        "kl": next((m["kl"] for m in reversed(real) if m.get("kl") is not None), None),
        "seconds": {k: round(v, 2) for k, v in state.seconds.items()},
        "sampled_tokens": tokens,
        "rollout_tokens_per_second": tokens / rollout_seconds if tokens and rollout_seconds else None,
        "peak_memory_gib": peak_memory(trainer.device),
        "machine": machine(trainer.device),
    }
    draw(folder.path, metrics, predictions)
    health.health_curves(real, folder.path / "health.png")
    health.score_histogram(predictions, folder.path / "histogram.png")
    html.write(folder.path, clean(summary), real, predictions["after"])
    write_json(folder.path / "summary.json", clean(summary))
    print_table({name: evaluation for name, evaluation in evaluations.items() if evaluation})
    print(f"time by phase: {', '.join(f'{k} {v:.0f} s' for k, v in state.seconds.items())}")
    print(f"wrote {folder.path}/ (report.html, summary.json, predictions.jsonl, plots, final/)", flush=True)


def draw(path: Path, metrics: list[dict[str, Any]], predictions: dict[str, list[dict[str, Any]]]) -> None:
    """All plots of a run."""
    real = [m for m in metrics if m["phase"] != "warmup"]
    plots.training_curves(real, path / "training.png", [m for m in metrics if m["phase"] == "warmup"])
    plots.before_after(predictions, path / "before_after.png")
    plots.calibration_plot(predictions, path / "calibration.png")


def print_table(evaluations: dict[str, dict[str, Any]]) -> None:
    """Before and after, side by side."""
    print(f"\n{'held-out rows':<14}{'n':>5}{'Pearson':>26}{'Spearman':>10}{'Kendall':>9}{'RMSE':>7}{'no score':>10}")
    for name, e in evaluations.items():
        interval = (e.get("ci95") or {}).get("pearson")
        pearson = _number(e["pearson"]) + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")
        print(
            f"{name:<14}{e['n']:>5}{pearson:>26}{_number(e['spearman']):>10}{_number(e['kendall']):>9}"
            f"{_number(e['rmse'], 2):>7}{e['no_score']:>10}"
        )
    protocols = sorted({e.get("protocol", "real") for e in evaluations.values()})
    print(f"(protocol {', '.join(protocols)}; 95 % intervals by resampling prompts)")


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
