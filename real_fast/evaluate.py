"""The command that evaluates a judge on a file or a dataset:

real-fast evaluate --model runs/x/final --data bench.jsonl --output runs/x/eval
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from real_fast.commands import run as run_command

if __name__ == "__main__":  # before what takes seconds to import
    sys.exit(run_command("evaluate"))

from real_fast.config import Config, cli
from real_fast.config.commands import COMMANDS, EvaluateConfig
from real_fast.data.dataset import Rejected, load_benchmarks, write_rejected
from real_fast.data.sources import describe
from real_fast.errors import OutputError
from real_fast.evaluation.benchmarks import by_benchmark, tables
from real_fast.evaluation.run import evaluate
from real_fast.model.judge_settings import defaults_of
from real_fast.model.load import load_tokenizer
from real_fast.prompt.builder import PromptBuilder
from real_fast.reports import plots
from real_fast.reports.health import evaluation_warnings
from real_fast.rollout.make import load_engine
from real_fast.runs.folder import check_writable, remove_left_over, writing
from real_fast.runs.lock import alone_in
from real_fast.runs.progress import progress_bar
from real_fast.score.scale import ScoreScale
from real_fast.utils.jsonio import clean, write_json, write_jsonl


def parse(argv: list[str]) -> EvaluateConfig:
    """Parse the command line; what the model's folder says about judging comes first, so flags win."""
    config: EvaluateConfig = cli.parse(COMMANDS["evaluate"], "real-fast evaluate", argv, defaults_of)
    return config


def prepare_output(folder: Path, overwrite: bool) -> None:
    """Make the folder and try to write to it, before anything slow starts.

    Raises:
        OutputError: It holds an evaluation, and `overwrite` is off; or it cannot be written to.
    """
    if (folder / "summary.json").exists() and not overwrite:
        raise OutputError(f"output {folder} already holds a summary.json: take another --output, or --overwrite")
    check_writable(folder)
    remove_left_over(folder)


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate as configured, write the files and return the summary. Raises :class:`UserError`."""
    full = config.full()
    with alone_in(config.output):
        return _run(config, full)


def _run(config: EvaluateConfig, full: Config) -> dict[str, Any]:
    folder = Path(config.output).expanduser()
    prepare_output(folder, config.overwrite)
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    scale = ScoreScale.from_config(tokenizer, config.scale, config.prompt)
    builder = PromptBuilder(config.prompt, tokenizer, scale)
    rejected: list[Rejected] = []
    limit, data = config.prompt.max_tokens, full.data
    try:
        rows = load_benchmarks(config.data, config.split, data, limit, builder, scale, rejected, "data")
    finally:
        with writing(folder):
            write_rejected(folder / "rejected.jsonl", rejected)

    engine = load_engine(full, tokenizer, scale)
    try:
        with progress_bar("evaluate", len(rows), "row") as bar:
            result = evaluate(
                engine, rows, scale, full.eval, config.rollout, config.seed, bar.update, config.renormalize
            )
    finally:
        engine.close()

    about = {
        "model": config.model,
        "data": config.data,
        "split": config.split,
        "engine": engine.name,
        "rejected": len(rejected),
    }
    summary: dict[str, Any] = clean({**about, **result.summary})
    with writing(folder):
        # Of an evaluation that is overwritten: no mixture is complete.
        (folder / "summary.json").unlink(missing_ok=True)
        cli.dump(config, folder / "config.yaml")
        write_jsonl(folder / "predictions.jsonl", result.predictions)
        panels = by_benchmark(result.predictions, Path(describe(config.data)).name)
        plots.before_after(panels, folder / "scatter.png")
        plots.calibration_plot(panels, folder / "calibration.png")
        write_json(folder / "summary.json", summary)  # last: it marks a complete evaluation
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 2 for a mistake of the user's, 130 for Ctrl-C."""
    return run_command("evaluate", argv)


def work(config: EvaluateConfig) -> int:
    """What the command does: evaluate, and print the table. Returns the exit status."""
    summary = run(config)
    print(tables(summary))
    for warning in evaluation_warnings(summary):
        print(f"warning: {warning}")
    if summary["rejected"]:
        print(f"{summary['rejected']} records were not used: see {config.output}/rejected.jsonl")
    print(f"written to {config.output}")
    return 0
