"""The command that compares judges: one table over runs and benchmarks, with paired tests.

real-fast compare runs/* --output comparison
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from real_fast.commands import run as run_command

if __name__ == "__main__":  # before what takes seconds to import
    sys.exit(run_command("compare"))

from real_fast.comparison.compare import compare
from real_fast.comparison.find import find_evaluations, pool_seeds
from real_fast.comparison.plot import comparison_plot
from real_fast.comparison.text import csv_text, markdown
from real_fast.config.commands import CompareConfig
from real_fast.config.validation import check_bounds
from real_fast.errors import ConfigError, NoEvaluationError, OutputError, UserError
from real_fast.runs.folder import check_writable, writing
from real_fast.runs.lock import alone_in
from real_fast.runs.progress import progress_bar
from real_fast.utils.files import replacing

FILES = ("comparison.md", "comparison.csv", "comparison.png")


def run(config: CompareConfig) -> str:
    """Compare, write the files and return the Markdown. Raises :class:`UserError`, or ValueError for broken JSON."""
    folder = Path(config.output).expanduser()
    if not config.folders:
        raise ConfigError("folders is not set: name the runs to compare, for example real-fast compare runs/*")
    check_bounds(config)
    evaluations, passed_over = find_evaluations(config.folders)
    if config.pool_seeds:
        evaluations, apart = pool_seeds(evaluations)
        passed_over += apart
    if (held := [name for name in FILES if (folder / name).exists()]) and not config.overwrite:
        raise OutputError(f"output {folder} already holds {held[0]}: take another --output, or --overwrite")
    check_writable(folder)
    with alone_in(folder):
        with progress_bar("resample", len(evaluations), "evaluation") as bar:
            lines, notes = compare(evaluations, config.baseline, config.bootstrap, config.seed, bar.update)
        text = markdown(lines, [*passed_over, *notes], config.bootstrap, config.baseline)
        with writing(folder):
            for name, content in zip(FILES, (text, csv_text(lines)), strict=False):
                with replacing(folder / name) as temporary:
                    temporary.write_text(content, encoding="utf-8")
            comparison_plot(lines, folder / FILES[2])
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 2 for a mistake of the user's, 130 for Ctrl-C."""
    return run_command("compare", argv)


def work(config: CompareConfig) -> int:
    """What the command does. Returns the exit status."""
    try:
        print(run(config))
    except UserError:
        raise
    except ValueError as error:  # a file of an evaluation that is not JSON
        raise NoEvaluationError(str(error)) from error
    print(f"written to {config.output}", file=sys.stderr)
    return 0
