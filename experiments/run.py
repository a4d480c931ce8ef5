"""The command that runs an experiment, or what is left of it, and writes its results.

python -m experiments.run --config experiments/cpu.yaml
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import yaml

from experiments import data, record, results
from experiments.launch import needed, run_all, run_one
from experiments.settings import TEMPLATE, Experiment, load, run_folder
from real_fast.config import PromptConfig, ScaleConfig, cli
from real_fast.errors import ConfigError, OutputError, UserError
from real_fast.model.load import load_tokenizer
from real_fast.prompt.builder import PromptBuilder
from real_fast.runs.folder import check_writable
from real_fast.score.scale import ScoreScale

PROG = "experiments.run"
# As the tests and the benchmarks have it.
_DATA = Path(os.environ.get("REAL_FAST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 1 if a run failed, 2 for a mistake of the user's, 130 for Ctrl-C."""
    parser = parser_of(PROG, "Run an experiment; go on where it stopped.")
    parser.add_argument("--results-only", action="store_true", help="run nothing; write the results of finished runs")
    args = parser.parse_args(argv)

    def work(failed: list[str]) -> None:
        experiment, folder = opened(args)
        kept = args.results or folder / "results"
        for place in (folder, kept):
            check_writable(place)
        with nullcontext() if args.results_only else alone_in(folder):
            require_same(experiment, folder)
            prepare_data(experiment, args.data.expanduser(), folder)
            record.read(experiment, kept, folder / "data")  # what does not fit is said before hours of work
            if not args.results_only:
                runs = needed(experiment, folder, kept, args.methods)
                run_all(experiment, runs, partial(run_one, experiment, folder, kept), failed, args.jobs)
        if not failed or record.read(experiment, kept, folder / "data"):
            print(results.write(experiment, folder / "data", kept))

    return reported(PROG, work)


def reported(prog: str, work: Callable[[list[str]], None]) -> int:
    """Do a command's work, and say what went wrong.

    Args:
        prog: The command's name, for messages.
        work: Gets a list, to which it adds a sentence for each run that failed.

    Returns:
        The exit status: 1 if a run failed, 2 for a mistake of the user's, 130 for Ctrl-C and what counts as it.
    """
    failed: list[str] = []
    try:
        with stopped_by(signal.SIGTERM, signal.SIGHUP):
            work(failed)
    except (OSError, UserError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    finally:
        for what in failed:
            print(f"{prog}: error: {what}", file=sys.stderr)
    return 1 if failed else 0


def parser_of(prog: str, description: str) -> argparse.ArgumentParser:
    """A command line that names an experiment, its data, its folders and some of its methods."""
    parser = argparse.ArgumentParser(prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=Path("experiments/cpu.yaml"))
    parser.add_argument("--data", type=Path, default=_DATA, help=f"folder of the data files (default: {_DATA})")
    parser.add_argument("--output", type=Path, help="folder of the runs (default: runs/experiment-NAME)")
    parser.add_argument("--results", type=Path, help="folder of finished runs' files and tables (OUTPUT/results)")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="these alone, and what they start from")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default: 1)")
    return parser


def opened(args: argparse.Namespace) -> tuple[Experiment, Path]:
    """The experiment that a command line names, and its folder. Raises ConfigError, for --methods and --jobs too."""
    folder = (args.output or Path("runs") / f"experiment-{args.config.stem}").expanduser().resolve()
    experiment = load(args.config, folder)
    if args.jobs < 1:
        raise ConfigError(f"--jobs is {args.jobs}: it must be 1 or more")
    if unknown := sorted(set(args.methods or []) - set(experiment.methods)):
        raise ConfigError(f"--methods {unknown[0]}: {args.config} has {', '.join(experiment.methods)}")
    return experiment, folder


@contextmanager
def stopped_by(*signals: signal.Signals) -> Iterator[None]:
    """Let these signals do what Ctrl-C does: a closed terminal must not leave a run behind that nobody waits for."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which runs inherit: two of them must not write to one folder. Raises OutputError."""
    with (folder / "lock").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"{folder} is in use by another {PROG}, or by a run that it started") from error
        yield


def require_same(experiment: Experiment, folder: Path) -> None:
    """Refuse to mix runs of other settings with these; what has no run yet may change. Raises OutputError."""
    for method, seed in experiment.order():
        file = folder / "configs" / f"{method}-{seed}.yaml"
        if not (run_folder(folder, method, seed) / "config.yaml").is_file() or not file.is_file():
            continue
        if yaml.safe_load(file.read_text(encoding="utf-8")) != experiment.config(method, seed, folder):
            raise OutputError(
                f"{run_folder(folder, method, seed)} was made with other settings (see {file}): take another --output, "
                "or remove that run"
            )
    template, text = folder / TEMPLATE, experiment.template()
    if text is None:
        return
    if template.is_file() and template.read_text(encoding="utf-8") != text:
        raise OutputError(f"the runs in {folder} have another prompt template (see {template}): take another --output")
    template.parent.mkdir(exist_ok=True)
    template.write_text(text, encoding="utf-8")


def prepare_data(experiment: Experiment, source: Path, folder: Path) -> None:
    """Write the rows that all runs share into FOLDER/data."""
    common = experiment.common
    tokenizer = load_tokenizer(experiment.model, False)
    given = experiment.config(*experiment.order()[0], folder).get("prompt", {})
    prompt: PromptConfig = cli.from_namespace(PromptConfig, given)
    scale_config: ScaleConfig = cli.from_namespace(ScaleConfig, common.get("scale", {}))
    scale = ScoreScale.from_config(tokenizer, scale_config, prompt)
    data.prepare(experiment, source, folder / "data", prompt, PromptBuilder(prompt, tokenizer, scale), scale)


if __name__ == "__main__":
    sys.exit(main())
