"""The figure of a comparison: every method on every benchmark, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from real_fast.comparison.table import ResultRow
from real_fast.comparison.text import MARK
from real_fast.reports.plots import BLUE, GREY, ORANGE, describe, new_figure, save_figure


def comparison_plot(lines: Sequence[ResultRow], path: str | Path) -> None:
    """Pearson correlation and RMSE of every method with 95 % intervals, a row of panels for each benchmark.

    Args:
        lines: Of :func:`real_fast.comparison.compare.compare`; at least one.
        path: PNG file.
    """
    tables = {
        name: [line for line in lines if line.benchmark == name]
        for name in dict.fromkeys(line.benchmark for line in lines)
    }
    most = max(map(len, tables.values()))
    figure, panels = new_figure(len(tables), 2, 0.8 + len(tables) * (1.0 + 0.4 * most), sharex="col")
    for row, (name, some) in zip(panels, tables.items(), strict=True):
        for axes, statistic, what in zip(row, ("pearson", "rmse"), ("Pearson r", "RMSE (score units)"), strict=True):
            for place, line in enumerate(some):
                e = line.estimates[statistic]
                if e.value is None:
                    axes.text(0.02, place, "undefined", transform=axes.get_yaxis_transform(), color=GREY, va="center")
                    continue
                ends = (e.value if e.low is None else e.low, e.value if e.high is None else e.high)
                spread = [[max(0.0, e.value - ends[0])], [max(0.0, ends[1] - e.value)]]
                color = ORANGE if line.compared_to == line.method else BLUE if line.covered else GREY
                axes.errorbar([e.value], [place], xerr=spread, fmt="o", color=color, capsize=4, elinewidth=1.6)
            axes.set_yticks(range(len(some)), [line.method + ("" if line.covered else f" {MARK}") for line in some])
            axes.set_ylim(len(some) - 0.5, -0.5)
            describe(axes, name, what if name == list(tables)[-1] else "", "")
        row[1].tick_params(labelleft=False)
    drawn = "prompts and seeds" if max(line.seeds for line in lines) > 1 else "prompts"
    about = f"95 % intervals by resampling {drawn}; orange: the reference of the tests"
    if not all(line.covered for line in lines):
        about += f"; {MARK}: scored too few rows to be compared"
    figure.supxlabel(about, fontsize=10.5, color=GREY)
    save_figure(figure, path)
