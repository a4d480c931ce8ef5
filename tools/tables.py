"""Write every generated table of README.md and docs/, and the plans in configs/: ``make tables``.

A page says where a table goes by two comments on lines of their own, ``<!-- NAME:start -->`` and ``<!-- NAME:end -->``.
What stands between them is made from committed results alone: docs/results/, docs/reliability.json, benchmarks/results/
and experiments/.

python -m tools.tables                  write all pages
python -m tools.tables keep RUN NAME    copy a run's summary.json and plots to docs/results/NAME*, then write all pages
python -m tools.tables add CSV          add the lines of gpu-check's benchmarks.csv to ours, then write all pages
python -m tools.tables show             print the benchmarks' tables of $REAL_FAST_RESULTS, and write nothing
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.record import add, read
from tools import (
    benchmark_tables,
    experiment_tables,
    gpu_tables,
    host_tables,
    memory_tables,
    paper_tables,
    plan_headers,
    reliability_tables,
    run_tables,
    scaling_tables,
)

ROOT = Path(__file__).resolve().parent.parent
PROG = "tools.tables"
_COMMENT = re.compile(r"^<!-- ([\w-]+):(start|end) -->$", re.M)


class MarkerError(ValueError):
    """A page's comments do not pair up, or no table has their name. The message names the page and the comment."""


def fill(text: str, marker: str, content: str) -> str:
    """Replace what stands between two markers; a marker that is not there changes nothing."""
    pattern = re.compile(rf"(^<!-- {marker}:start -->\n).*?(^<!-- {marker}:end -->$)", re.S | re.M)
    return pattern.sub(lambda m: f"{m[1]}{content}\n{m[2]}", text)


def markers(text: str, page: str) -> list[str]:
    """Names of a page's markers, in order.

    Raises:
        MarkerError: A start without its end, or the other way round.
    """
    found = _COMMENT.findall(text)
    names = [name for name, side in found if side == "start"]
    if found != [(name, side) for name in names for side in ("start", "end")]:
        raise MarkerError(
            f"{page}: every <!-- NAME:start --> needs its <!-- NAME:end --> right behind it; found {found}"
        )
    return names


def tables(root: Path) -> dict[str, str]:
    """Every table by its marker's name, from what is committed. Links have paths from the root: ``](/docs/...``."""
    return {
        **run_tables.tables(root / "docs" / "results"),
        **benchmark_tables.tables(root / "benchmarks" / "results", root),
        **memory_tables.tables(root / "benchmarks" / "results"),
        **host_tables.tables(root / "configs", root / "benchmarks" / "results"),
        **experiment_tables.tables(root / "experiments"),
        **scaling_tables.tables(root / "configs", root / "benchmarks" / "results"),
        **reliability_tables.tables(root / "docs"),
        **paper_tables.tables(root / "configs" / "paper", root / "experiments" / "paper"),
        "gpu-predictions": gpu_tables.predictions(read(root / "benchmarks" / "results" / "benchmarks.csv")),
        "one-gpu": plan_headers.table(root / "configs"),
    }


def pages(root: Path) -> list[Path]:
    """README, docs/*.md and experiments/paper.md."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md")), root / "experiments" / "paper.md"]


def filled(text: str, page: Path, made: dict[str, str], root: Path) -> str:
    """A page with its tables.

    Args:
        text: What the page says now.
        page: Where it lies: images are linked from there.
        made: See :func:`tables`.
        root: The repository.

    Raises:
        MarkerError: See :func:`markers`; or a marker that has no table.
    """
    up = os.path.relpath(root, page.parent)
    for name in markers(text, page.name):
        if name not in made:
            raise MarkerError(f"{page.name}: no table is called {name}; there are {', '.join(sorted(made))}")
        content = made[name].replace("](/", "](" if up == "." else f"]({up}/")
        text = fill(text, name, content)
    return text


def write(root: Path) -> list[Path]:
    """Write the tables into the pages; returns the pages that changed."""
    made, changed = tables(root), []
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        new = filled(text, page, made, root)
        if new != text:
            page.write_text(new, encoding="utf-8")
            changed.append(page)
    return changed


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        match arguments:
            case []:
                pass
            case ["keep", run, name]:
                run_tables.keep(Path(run), name, ROOT / "docs" / "results")
            case ["add", file]:
                print(f"{add(Path(file), ROOT / 'benchmarks' / 'results' / 'benchmarks.csv')} lines added")
            case ["show"]:
                print(benchmark_tables.text(read()))
                return 0
            case _:
                print(__doc__, file=sys.stderr)
                return 2
        changed = [*write(ROOT), *plan_headers.write(ROOT / "configs")]
    except (ValueError, OSError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{page.relative_to(ROOT)}: written" for page in changed) or "the pages are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
