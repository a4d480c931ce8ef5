"""The command that compares judges: one table over runs and benchmarks, with paired tests.

python -m real_fast.compare runs/* --output comparison
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from real_fast.comparison.bootstrap import Estimate
from real_fast.comparison.compare import compare
from real_fast.comparison.find import find_evaluations, pool_seeds
from real_fast.comparison.plot import comparison_plot
from real_fast.comparison.table import ResultRow
from real_fast.errors import OutputError, run_command
from real_fast.evaluation.metrics import WITH_INTERVALS
from real_fast.runs.folder import check_writable, writing
from real_fast.utils.jsonio import replacing

PROG = "real_fast.compare"
FILES = ("comparison.md", "comparison.csv", "comparison.png")
_HEADINGS = {"pearson": "Pearson", "spearman": "Spearman", "kendall": "Kendall", "rmse": "RMSE"}
_TESTED = ("pearson", "rmse")  # the table has differences of these; the CSV has all


def markdown(lines: Sequence[ResultRow], notes: Sequence[str], bootstrap: int, baseline: str | None) -> str:
    """The table, the best of each benchmark in bold, what its numbers mean, and what could not be compared."""
    many = max(line.seeds for line in lines) > 1
    about = ["benchmark", "method", "protocol", *(["seeds"] if many else []), "rows"]
    header = [*about, *_HEADINGS.values(), *(f"Δ {_HEADINGS[s]}" for s in _TESTED)]
    table = [header, ["---"] * len(header)]
    for line in lines:
        peers = [peer for peer in lines if peer.benchmark == line.benchmark]
        rows = str(line.rows) if not line.no_score else f"{line.predictions - line.no_score} of {line.predictions}"
        protocol = line.protocol + (f", n={line.feedbacks}" if line.feedbacks > 1 else "")
        cells = [_interval(line.estimates[s], 3, line is _best(peers, s)) for s in WITH_INTERVALS]
        about = [line.benchmark, line.method, protocol, *([str(line.seeds)] if many else []), rows]
        table.append([*about, *cells, *(_difference(line, s) for s in _TESTED)])
    text = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in table)
    against = f"`{baseline}`" if baseline else "the method with the highest Pearson correlation"
    drawn = "whole prompts, and of the seeds where a method has several" if many else "whole prompts"
    explained = (
        f"Brackets: 95 % intervals from {bootstrap} resamples of {drawn}. Δ: difference from {against} "
        "(reference) in the same resamples, on the rows that both methods scored, with a two-sided p; the p-values are "
        "not corrected for how many there are"
        + ("" if baseline else ", and favour the reference, which was picked on these very rows (or name a --baseline)")
        + ". Rows without a score count in no statistic."
    )
    return "\n".join([text, "", explained, *([""] if notes else []), *(f"- Note: {note}" for note in notes), ""])


def csv_text(lines: Sequence[ResultRow]) -> str:
    """A line per benchmark, method and statistic; empty where there is no number."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        [
            "benchmark", "method", "protocol", "feedbacks", "seeds", "rows", "no_score", "statistic", "value", "low",
            "high", "reference", "difference", "difference_low", "difference_high", "p", "paired_rows",
        ]
    )  # fmt: skip
    for line in lines:
        about = [line.benchmark, line.method, line.protocol, line.feedbacks or "", line.seeds, line.rows, line.no_score]
        for name, e in line.estimates.items():
            d = line.differences.get(name, Estimate(None))
            paired = line.paired_rows if line.differences else ""
            difference = [line.reference, d.value, d.low, d.high, d.p, paired]
            writer.writerow([*about, name, e.value, e.low, e.high, *difference])
    return file.getvalue()


def _best(lines: Sequence[ResultRow], statistic: str) -> ResultRow | None:
    known = [(v, line) for line in lines if (v := line.estimates[statistic].value) is not None]
    if len(known) < 2:
        return None
    return (min if statistic == "rmse" else max)(known, key=lambda pair: pair[0])[1]


def _interval(e: Estimate, digits: int, bold: bool = False) -> str:
    if e.value is None:
        return "-"
    value = f"**{e.value:.{digits}f}**" if bold else f"{e.value:.{digits}f}"
    return value if e.low is None or e.high is None else f"{value} [{e.low:.{digits}f}, {e.high:.{digits}f}]"


def _difference(line: ResultRow, statistic: str) -> str:
    if line.reference == line.method:
        return "reference"
    if statistic not in line.differences:
        return "-"
    e = line.differences[statistic]
    if e.value is None or e.low is None or e.high is None:
        return "-" if e.value is None else f"{e.value:+.3f}"
    return f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]" + ("" if e.p is None else f", p = {e.p:.3f}")


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
    with tqdm(total=len(evaluations), desc="resample", unit="evaluation") as bar:
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
