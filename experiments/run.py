"""The command that runs an experiment, or what is left of it, and writes its results.

python -m experiments.run --config experiments/cpu.yaml
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from experiments import data, results
from experiments.settings import Experiment, load, run_folder
from real_fast import settings
from real_fast.config import ConfigError, PromptConfig, ScaleConfig
from real_fast.data import DataError
from real_fast.model import ModelError, load_tokenizer
from real_fast.prompt import PromptBuilder, PromptError
from real_fast.run_folder import OutputError
from real_fast.scale import ScaleError, ScoreScale

PROG = "experiments.run"
# As the tests and the benchmarks have it.
_DATA = Path(os.environ.get("REAL_FAST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 1 if a run failed, 2 for a mistake of the user's, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(PROG, description="Run an experiment; go on where it stopped.", allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=Path("experiments/cpu.yaml"))
    parser.add_argument("--data", type=Path, default=_DATA, help="folder of the data files (default: $REAL_FAST_DATA)")
    parser.add_argument("--output", type=Path, help="folder of the runs (default: runs/experiment-NAME)")
    parser.add_argument(
        "--results", type=Path, default=Path("experiments"), help="folder of summary.json and the table"
    )
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="these alone, and what they start from")
    parser.add_argument("--results-only", action="store_true", help="run nothing; write the results of finished runs")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = (args.output or Path("runs") / f"experiment-{args.config.stem}").expanduser().resolve()
    try:
        experiment = load(args.config, folder)
        if unknown := sorted(set(args.methods or []) - set(experiment.methods)):
            raise ConfigError(f"--methods {unknown[0]}: {args.config} has {', '.join(experiment.methods)}")
        claim(folder, args.config)
        prepare_data(experiment, args.data.expanduser(), folder)
        failed = [] if args.results_only else run_all(experiment, folder, args.methods)
        text = results.write(experiment, folder, args.results)
    except (ConfigError, DataError, ModelError, OutputError, PromptError, ScaleError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    print(text)
    for name in failed:
        print(f"{PROG}: error: {name} failed: see {folder / 'logs' / name}.log", file=sys.stderr)
    return 1 if failed else 0


def claim(folder: Path, config: Path) -> None:
    """Keep the experiment's settings with its runs; another experiment must not go on there."""
    kept = folder / "experiment.yaml"
    text = config.read_text(encoding="utf-8")
    if kept.is_file() and yaml.safe_load(kept.read_text(encoding="utf-8")) != yaml.safe_load(text):
        raise OutputError(
            f"{folder} holds runs of other settings (see {kept}): take another --output, or remove the folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(text, encoding="utf-8")


def prepare_data(experiment: Experiment, source: Path, folder: Path) -> None:
    """Write the rows that all runs share."""
    common = experiment.common
    tokenizer = load_tokenizer(common["model"], False)
    prompt: PromptConfig = settings.from_namespace(PromptConfig, common.get("prompt", {}))
    scale_config = settings.from_namespace(ScaleConfig, common.get("scale", {}))
    scale = ScoreScale.from_tokenizer(tokenizer, scale_config.values, scale_config.phrase)
    data.prepare(experiment.data, source, folder / "data", prompt, PromptBuilder(prompt, tokenizer, scale), scale)


def run_all(experiment: Experiment, folder: Path, methods: Sequence[str] | None) -> list[str]:
    """Make the runs that are not done. Returns the names of those that failed; what starts from one is left out too."""
    wanted = set(methods or experiment.methods)
    for method in reversed(list(experiment.methods)):  # what a method starts from stands above it
        start = experiment.methods[method].get("init_from")
        if method in wanted and start:
            wanted.add(start)
    todo = [
        (method, seed)
        for method, seed in experiment.order()
        if method in wanted and not (run_folder(folder, method, seed) / "summary.json").is_file()
    ]
    failed: list[str] = []
    for place, (method, seed) in enumerate(todo, 1):
        name = f"{method}-{seed}"
        start = experiment.methods[method].get("init_from")
        print(f"[{time.strftime('%H:%M:%S')}] run {place} of {len(todo)}: {name}", flush=True)
        if f"{start}-{seed}" in failed or not run_one(experiment, folder, method, seed):
            failed.append(name)
    return failed


def run_one(experiment: Experiment, folder: Path, method: str, seed: int) -> bool:
    """Train one judge in a process of its own, or go on with it. Returns whether it got to its end."""
    name, output = f"{method}-{seed}", run_folder(folder, method, seed)
    for part in ("configs", "logs"):
        (folder / part).mkdir(exist_ok=True)
    config = folder / "configs" / f"{name}.yaml"
    config.write_text(yaml.safe_dump(experiment.config(method, seed, folder), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "real_fast.train", "--config", str(config)]
    if output.is_dir():
        command += ["--resume", "true"]
    log = folder / "logs" / f"{name}.log"
    with log.open("a", encoding="utf-8") as file:
        # In a session of its own, or Ctrl-C would reach it twice, which stops it without a checkpoint.
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            print(f"stopping {name} after its step (again: at once)", file=sys.stderr)
            process.send_signal(signal.SIGINT)
            try:
                process.wait()
            except KeyboardInterrupt:
                process.kill()
            raise
    if status == 130:
        raise KeyboardInterrupt
    if status == 0:
        for run in (output, output / "stage1"):  # the optimiser's state takes six times the model's room
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return status == 0


if __name__ == "__main__":
    sys.exit(main())
