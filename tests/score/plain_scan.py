"""Where verdicts stand, with what begins a quoted line in the one expression: the slow twin of the search."""

from __future__ import annotations

import re

from real_fast.score.ending import THOUGHTS
from real_fast.score.verdict import _QUOTES, Place


def plain_scan(text: str, phrase: str, thought: str) -> tuple[list[Place], str, bool]:
    """The places, the mark that closes what is open, and whether what is open counts if it is never closed."""
    found: list[Place] = []
    waiting: list[int] = []
    first = len(text) - len(text.lstrip())
    closing, certain = thought, bool(thought)  # certain: inside, whether it is closed or not
    for match in _plain_marks(phrase).finditer(text):
        mark, at = match[0], match.start()
        in_line = bool(closing) and closing not in THOUGHTS.values()
        if mark == phrase:
            if closing:
                waiting.append(at)
            else:
                found.append(Place(at, True))
        elif mark == "\n":
            if in_line:
                if not certain:
                    found += [Place(place, True) for place in waiting]
                waiting, closing, certain = [], "", False
        elif closing:
            if mark == closing and (mark not in "'’" or not text[at + 1 : at + 2].isalnum()):
                waiting, closing, certain = [], "", False
        elif mark in THOUGHTS:
            closing, certain = THOUGHTS[mark], at <= first
        elif mark.endswith(">") and mark not in THOUGHTS.values():
            closing, certain = "\n", True
        elif mark in _QUOTES and not text[at - 1 : at].isalnum() and not text[at + 1 : at + 2].isspace():
            closing, certain = _QUOTES[mark], False
    if not certain:
        found += [Place(at, False) for at in waiting]
    return found, closing, certain


def _plain_marks(phrase: str) -> re.Pattern[str]:
    """Whatever :func:`phrases_outside` stops at; the phrase first, since it may begin with a mark itself."""
    marks = [*THOUGHTS, *THOUGHTS.values(), *sorted({*_QUOTES, *_QUOTES.values()}), "\n"]
    return re.compile("|".join([re.escape(phrase), *map(re.escape, marks), r"^[ \t]{0,3}>"]), re.M)
