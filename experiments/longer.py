"""The held-out prompts' longer rows too, which the runs left out: graded by the final models, in a table of its own.

python -m experiments.longer --config experiments/cpu.yaml --max-tokens 2048
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.results import protocol_of, write_table
from experiments.run import opened, parser_of, prepare_data
from experiments.settings import Experiment, run_folder
from real_fast import evaluate
from real_fast.comparison.find import Evaluation
from real_fast.errors import ConfigError, DataError, OutputError
from real_fast.runs.folder import check_writable
from real_fast.utils.jsonio import read_jsonl

PROG = "experiments.longer"
BENCHMARK = "in_domain_longer"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 1 if an evaluation failed, 2 for a mistake, 130 for Ctrl-C."""
    parser = parser_of(PROG, "Grade longer held-out rows.")
    parser.add_argument("--results", type=Path, help="folder of the table (default: OUTPUT/results/longer)")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="these alone")
    parser.add_argument("--max-tokens", type=int, default=2048, help="of a prompt (default: 2048)")
    args = parser.parse_args(argv)
    try:
        experiment, folder = opened(args)
        results = args.results or folder / "results" / "longer"
        # Whole files of the training domain: the split is by prompt, so the same prompts are held out.
        experiment.data = replace(experiment.data, unseen=[])
        data = folder / f"data-{args.max_tokens}"
        prepare_data(experiment, args.data.expanduser(), folder, data, args.max_tokens)
        check_writable(results)
        failed = [
            f"{method}-{seed}"
            for method, seed in experiment.order()
            if method in (args.methods or experiment.methods)
            and (run_folder(folder, method, seed) / "summary.json").is_file()
            and grade(experiment, method, seed, folder, data, args.max_tokens)
        ]
        found = graded(experiment, folder, data)
        if not found:
            raise OutputError(f"{folder} has no finished run: make experiment first")
        print(write_table(found, experiment.baseline, [], results))
    except (ConfigError, DataError, OSError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    for run in failed:
        print(f"{PROG}: error: {run} was not graded", file=sys.stderr)
    return 1 if failed else 0


def grade(experiment: Experiment, method: str, seed: int, folder: Path, data: Path, max_tokens: int) -> int:
    """Grade the rows by a run's final model, unless that is done. Returns the exit status of real_fast.evaluate."""
    output = _output(folder, method, seed, data)
    if (output / "summary.json").is_file():
        return 0
    print(f"{method}-{seed}", file=sys.stderr)
    rollout = experiment.common.get("rollout", {})
    flags = {
        "model": run_folder(folder, method, seed) / "final",
        "data": data / "test.jsonl",
        "output": output,
        "prompt.max_tokens": max_tokens,
        "eval.protocol": protocol_of(experiment, method),
        "eval.temperature": experiment.common.get("eval", {}).get("temperature", 1.0),
        "rollout.engine": rollout.get("engine", "auto"),
        # Longer prompts have larger caches.
        "rollout.max_num_seqs": max(1, rollout.get("max_num_seqs", 256) // 4),
    }
    status = evaluate.main([part for name, value in flags.items() for part in (f"--{name}", str(value))])
    if status == 130:
        raise KeyboardInterrupt
    return status


def graded(experiment: Experiment, folder: Path, data: Path) -> list[Evaluation]:
    """The evaluations that are there."""
    found = []
    for method, seed in experiment.order():
        output = _output(folder, method, seed, data)
        if not (output / "summary.json").is_file():
            continue
        file = output / "predictions.jsonl"
        protocol = protocol_of(experiment, method)
        found.append(Evaluation(method, BENCHMARK, protocol, 1, read_jsonl(file), file, output, seed))
    return found


def _output(folder: Path, method: str, seed: int, data: Path) -> Path:
    return run_folder(folder, method, seed) / data.name


if __name__ == "__main__":
    sys.exit(main())
