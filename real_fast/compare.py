"""The command that compares judges: one table over runs and benchmarks, with paired tests.

python -m real_fast.compare runs/* --output comparison
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from real_fast.comparison.compare import compare
from real_fast.comparison.find import find_evaluations, pool_seeds
from real_fast.comparison.plot import comparison_plot
from real_fast.comparison.text import csv_text, markdown
from real_fast.errors import OutputError, run_command
from real_fast.runs.folder import check_writable, writing
from real_fast.runs.progress import progress_bar
from real_fast.utils.jsonio import replacing

PROG = "real_fast.compare"
FILES = ("comparison.md", "comparison.csv", "comparison.png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROG, description="Compare the evaluations of runs.", allow_abbrev=False)
    parser.add_argument("folders", nargs="+", help="runs, folders of real_fast.evaluate, or folders of them")
    parser.add_argument("--output", default="comparison", help=f"folder for {', '.join(FILES)} (default: comparison)")
    parser.add_argument("--baseline", help="method to compare the others with (default: the highest Pearson)")
    parser.add_argument("--pool-seeds", action="store_true", help="one line for runs that differ by their seed alone")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples of whole prompts (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier comparison in the output folder")
    return parser


def run(args: argparse.Namespace) -> str:
    """Compare, write the files and return the Markdown. Raises NoEvaluationError, OutputError or ValueError."""
    folder = Path(args.output).expanduser()
    if args.bootstrap < 1:
        raise ValueError(f"--bootstrap is {args.bootstrap}: it must be 1 or more")
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}: it must be 0 or more")
    evaluations, passed_over = find_evaluations(args.folders)
    if args.pool_seeds:
        evaluations, apart = pool_seeds(evaluations)
        passed_over += apart
    if (held := [name for name in FILES if (folder / name).exists()]) and not args.overwrite:
        raise OutputError(f"output {folder} already holds {held[0]}: take another --output, or --overwrite")
    check_writable(folder)
    with progress_bar("resample", len(evaluations), "evaluation") as bar:
        lines, notes = compare(evaluations, args.baseline, args.bootstrap, args.seed, bar.update)
    text = markdown(lines, [*passed_over, *notes], args.bootstrap, args.baseline)
    with writing(folder):
        for name, content in zip(FILES, (text, csv_text(lines)), strict=False):
            with replacing(folder / name) as temporary:
                temporary.write_text(content, encoding="utf-8")
        comparison_plot(lines, folder / FILES[2])
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 2 for a mistake of the user's, 130 for Ctrl-C."""
    args = _parser().parse_args(argv)
    # ValueError: a file of an evaluation that is not JSON
    return run_command(PROG, lambda: _main(args), "stopped: no comparison was written", known=(ValueError,))


def _main(args: argparse.Namespace) -> int:
    print(run(args))
    print(f"written to {args.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
