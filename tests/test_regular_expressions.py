"""No regular expression takes more than linear time: whatever is in the data, reading it must not stand still."""

from __future__ import annotations

import ast
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from real_fast.data.rows import cut_score
from real_fast.score.scale import ScoreScale
from real_fast.score.verdict import phrases_outside, written_behind

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("real_fast", "experiments", "benchmarks", "tools", "examples")
SCALE = ScoreScale((1.0, 2.0), ("1", "2"), (11, 12), "So the overall score is ", (5, 6), 1)

# 16,000 repetitions take a linear one milliseconds, and a quadratic one a second and more.
LIMIT = 0.4

# What a text repeats, behind what an expression may begin with.
PUMPS = (
    " ",
    "\n",
    "\t\n",
    "1",
    "1.",
    "a",
    "A",
    "_",
    "-",
    ".",
    "*",
    "/",
    "a/",
    "=",
    '"',
    "'",
    "> ",
    "\n>",
    "<think>",
    "</",
)
HEADS = (
    "",
    "a",
    "/",
    ".",
    "score",
    "[RESULT]",
    "So the overall score is",
    "-seed",
    ".old-1",
    "<!-- a:start -->\n",
    "a=",
)


def expressions() -> Iterator[tuple[str, str, str]]:
    """Every pattern that is written out in a call of :mod:`re`, how it is used, and where; what is put in is "x"."""
    for file in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "re") or node.func.attr == "escape":
                continue
            given = node.args[0]
            parts = given.values if isinstance(given, ast.JoinedStr) else [given]
            if any(isinstance(part, ast.Constant) for part in parts):
                pattern = "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in parts)
                yield f"{file.relative_to(ROOT)}:{node.lineno}", pattern, node.func.attr


def slowest(work: Callable[[str], Any], unit: str, head: str, tail: str = "\x00") -> float:
    """Seconds for up to 16,000 repetitions of `unit`, or of as many as took too long already."""
    seconds = 0.0
    for n in (30, 100, 1000, 16_000):
        text = head + unit * n + tail
        for _ in range(3):  # a collection of garbage in a large process takes as long as what is looked for
            started = time.process_time()
            work(text)
            seconds = time.process_time() - started
            if seconds < LIMIT:
                break
        else:
            return seconds
    return seconds


@pytest.mark.parametrize(("where", "pattern", "used"), [pytest.param(*found, id=found[0]) for found in expressions()])
def test_an_expression_is_linear(where: str, pattern: str, used: str) -> None:
    compiled = re.compile(pattern, re.M)
    work = {"fullmatch": compiled.fullmatch, "match": compiled.match}.get(used, compiled.search)
    for head in HEADS:
        for pump in PUMPS:
            assert slowest(work, pump, head) < LIMIT, f"{where}: {pattern!r} on {head!r} and many {pump!r}"


@pytest.mark.parametrize(
    "work",
    [
        lambda text: cut_score(text, SCALE),
        lambda text: phrases_outside(text, "So the overall score is"),
        lambda text: written_behind(text, 0, " ", SCALE.texts),
    ],
    ids=["cut_score", "phrases_outside", "written_behind"],
)
@pytest.mark.parametrize("pump", [*PUMPS, "[RESULT]", "So the overall score is", '"So the overall score is', " . "])
def test_verdicts_are_looked_for_in_linear_time(work: Callable[[str], Any], pump: str) -> None:
    for head in ("", "So the overall score is", "Good. [RESULT] Score: "):
        for tail in ("", "x", " 4"):
            assert slowest(work, pump, head, tail) < LIMIT


def test_four_hundred_line_breaks() -> None:
    assert cut_score("Good. [RESULT]" + "\n" * 400 + "x", SCALE).endswith("x")
    assert cut_score("Good. [RESULT]" + "\n" * 400 + "4" + "\n" * 400, SCALE) == "Good."
