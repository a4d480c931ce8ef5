"""A comparison as Markdown for people and as CSV for everything else."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from real_fast.comparison.bootstrap import Estimate
from real_fast.comparison.table import MIN_COVERAGE, ResultRow
from real_fast.evaluation.metrics import WITH_INTERVALS

_HEADINGS = {"pearson": "Pearson", "spearman": "Spearman", "kendall": "Kendall", "rmse": "RMSE"}

MARK = "†"  # beside the coverage of a method that has scored too few rows
_TESTED = ("pearson", "rmse")  # the table has differences of these; the CSV has all


def markdown(lines: Sequence[ResultRow], notes: Sequence[str], bootstrap: int, baseline: str | None) -> str:
    """The table, the best of each benchmark in bold, what its numbers mean, and what could not be compared."""
    many = max(line.seeds for line in lines) > 1
    about = ["benchmark", "method", "protocol", *(["seeds"] if many else []), "rows", "coverage"]
    header = [*about, *_HEADINGS.values(), *(f"Δ {_HEADINGS[s]}" for s in _TESTED)]
    table = [header, ["---"] * len(header)]
    for line in lines:
        peers = [peer for peer in lines if peer.benchmark == line.benchmark]
        rows = str(line.rows) if not line.no_score else f"{line.predictions - line.no_score} of {line.predictions}"
        protocol = line.protocol + (f", n={line.feedbacks}" if line.feedbacks > 1 else "")
        cells = [_interval(line.estimates[s], 3, line is _best(peers, s)) for s in WITH_INTERVALS]
        coverage = f"{100 * line.coverage:.3g} %" + ("" if line.covered else f" {MARK}")
        about = [line.benchmark, line.method, protocol, *([str(line.seeds)] if many else []), rows, coverage]
        table.append([*about, *cells, *(_difference(line, s) for s in _TESTED)])
    text = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in table)
    against = f"`{baseline}`" if baseline else "the method with the highest Pearson correlation"
    drawn = "whole prompts, and of the seeds where a method has several" if many else "whole prompts"
    explained = (
        f"Brackets: 95 % intervals from {bootstrap} resamples of {drawn}. Δ: difference from {against} "
        "(reference) in the same resamples, on the rows that both methods scored, with a two-sided p; the p-values are "
        "not corrected for how many there are"
        + ("" if baseline else ", and favour the reference, which was picked on these very rows (or name a --baseline)")
        + ". Rows without a score count in no statistic; methods are compared on the rows that all of them scored."
        + (
            f" {MARK}: scored fewer than {MIN_COVERAGE:.0%} as many rows as the method with the most, so its numbers "
            "are of other, perhaps easier rows; it is never best, and reference only where it is the --baseline."
            if not all(line.covered for line in lines)
            else ""
        )
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
            "coverage", "used_rows", "covered",
        ]
    )  # fmt: skip
    for line in lines:
        about = [line.benchmark, line.method, line.protocol, line.feedbacks or "", line.seeds, line.rows, line.no_score]
        for name, e in line.estimates.items():
            d = line.differences.get(name, Estimate(None))
            paired = line.paired_rows if line.differences else ""
            difference = [line.compared_to, d.value, d.low, d.high, d.p, paired]
            covered = [line.coverage, line.used_rows, line.covered]
            writer.writerow([*about, name, e.value, e.low, e.high, *difference, *covered])
    return file.getvalue()


def _best(lines: Sequence[ResultRow], statistic: str) -> ResultRow | None:
    known = [(v, line) for line in lines if line.covered and (v := line.estimates[statistic].value) is not None]
    if len(known) < 2:
        return None
    return (min if statistic == "rmse" else max)(known, key=lambda pair: pair[0])[1]


def _interval(e: Estimate, digits: int, bold: bool = False) -> str:
    if e.value is None:
        return "-"
    value = f"**{e.value:.{digits}f}**" if bold else f"{e.value:.{digits}f}"
    return value if e.low is None or e.high is None else f"{value} [{e.low:.{digits}f}, {e.high:.{digits}f}]"


def _difference(line: ResultRow, statistic: str) -> str:
    if line.compared_to == line.method:
        return "reference"
    if statistic not in line.differences:
        return "-"
    e = line.differences[statistic]
    if e.value is None or e.low is None or e.high is None:
        return "-" if e.value is None else f"{e.value:+.3f}"
    return f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]" + ("" if e.p is None else f", p = {e.p:.3f}")
