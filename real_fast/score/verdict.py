"""What counts as the verdict of a text: the phrase outside thoughts and quotations, and the score behind it.

Text alone, in one pass over it; :mod:`real_fast.score.phrase` finds the tokens. docs/rollouts.md has the rules.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from real_fast.score.ending import THOUGHTS

_MARGIN = re.compile(r"[ \t]{0,3}")
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "„": "“", "«": "»", "‘": "’"}


@dataclass(frozen=True)
class Place:
    """A phrase outside thoughts and quotations.

    Attributes:
        at: Its first character.
        sure: Whether no further text can put it into a thought or a quotation.
    """

    at: int
    sure: bool


@dataclass(frozen=True)
class Written:
    """What stands behind a phrase.

    Attributes:
        score: Place on the scale, None for anything else, longer numbers and words among it.
        sure: Whether no further text can change that.
    """

    score: int | None
    sure: bool


def thought_left_open(prompt: str) -> str:
    """The tag that closes the thought which a prompt's last characters open ("<think>\\n"); empty for none."""
    return next((close for tag, close in THOUGHTS.items() if prompt.rstrip().endswith(tag)), "")


def may_close(text: str) -> bool:
    """Whether `text` may end a thought, a quotation or a quoted line."""
    return any(mark in text for mark in ("\n", ">", "]", *_QUOTES.values()))


def phrases_outside(text: str, phrase: str, thought: str = "") -> tuple[list[Place], str]:
    """Every place of `phrase` in `text` that may be a verdict, in order, and what closes what `text` leaves open.

    Not in a thought (one that opens the text, or that the prompt left open, and is not closed yet, counts too), not
    between quotation marks of one line, not in a line that ``>`` marks as quoted.

    Args:
        text: An answer, possibly not at its end yet.
        phrase: Without white space at its ends.
        thought: What closes the thought that the prompt left open; empty for none.

    Returns:
        The places, and a thought's closing tag, a line break for what is quoted, or "" where nothing is open.
    """
    found, closing, _ = _scan(text, phrase, thought)
    return found, closing if closing in ("", *THOUGHTS.values()) else "\n"


def thought_cut_off(text: str, phrase: str, thought: str = "") -> str:
    """What closes the thought that `text` ends in, where nothing written behind it would be an answer; empty for none.

    Arguments as of :func:`phrases_outside`.
    """
    _, closing, certain = _scan(text, phrase, thought)
    return closing if certain and closing in THOUGHTS.values() else ""


def _scan(text: str, phrase: str, thought: str) -> tuple[list[Place], str, bool]:
    """The places, the mark that closes what is open, and whether what is open counts if it is never closed."""
    found: list[Place] = []
    waiting: list[int] = []
    first = len(text) - len(text.lstrip())
    closing, certain = thought, bool(thought)  # certain: inside, whether it is closed or not
    for match in _marks(phrase).finditer(text):
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
        elif mark == ">":
            if _MARGIN.fullmatch(text, text.rfind("\n", 0, at) + 1, at):  # a quoted line
                closing, certain = "\n", True
        elif mark in _QUOTES and not text[at - 1 : at].isalnum() and not text[at + 1 : at + 2].isspace():
            closing, certain = _QUOTES[mark], False
    if not certain:
        found += [Place(at, False) for at in waiting]
    return found, closing, certain


@cache
def _marks(phrase: str) -> re.Pattern[str]:
    """Whatever :func:`phrases_outside` stops at; the phrase first, since it may begin with a mark itself."""
    marks = [*THOUGHTS, *THOUGHTS.values(), *sorted({*_QUOTES, *_QUOTES.values()}), "\n"]
    # Each begins with a letter of its own, which lets the search skip what begins with none of them.
    return re.compile("|".join(map(re.escape, [phrase, *marks, ">"])))


def written_behind(text: str, at: int, space: str, texts: tuple[str, ...]) -> Written:
    """Read the score in `text` at `at`, behind a phrase's last visible character.

    Args:
        text: Up to the end, or to where sampling is.
        at: Where the phrase ends.
        space: The phrase's trailing white space, which must stand in front of the score.
        texts: How each score of the scale is written.
    """
    longest = max(map(len, texts))
    return _written(text[at : at + len(space) + longest + 2], space, texts)  # two characters behind show what it is


@lru_cache(1024)  # few things stand behind a phrase, and each in many samples
def _written(rest: str, space: str, texts: tuple[str, ...]) -> Written:
    if not rest.startswith(space):
        return Written(None, not space.startswith(rest))
    rest = rest[len(space) :]
    longer = any(text != rest and text.startswith(rest) for text in texts)
    score = max((i for i, text in enumerate(texts) if rest.startswith(text)), key=lambda i: len(texts[i]), default=None)
    if score is None:
        return Written(None, not longer)
    behind = rest[len(texts[score]) :]
    if behind[:1].isalnum():
        return Written(None, not longer)
    if texts[score][-1:].isdigit() and behind[:1] in tuple(".,-–"):  # 4.5 and 4-5 are not 4; 4. is
        return Written(None, True) if behind[1:2].isdigit() else Written(score, len(behind) > 1)
    return Written(score, bool(behind))


def cut_verdict(feedback: str, phrases: Sequence[str], texts: Sequence[str]) -> str:
    """A feedback without the verdict at its end, in time proportional to its length.

    Args:
        feedback: Of anybody's.
        phrases: Any of them begins a verdict, whatever its case; "score", a colon and a score may follow.
        texts: How scores are written; numbers ("4", "**4**/5", "4 out of 5") are scores too.
    """
    end = len(feedback)
    while end and (feedback[end - 1].isspace() or feedback[end - 1] == "."):
        end -= 1
    found = list(re.finditer("|".join(map(re.escape, phrases)), feedback, re.IGNORECASE))
    if not found:
        return feedback.strip()
    last = found[-1]
    number = r"[-+]?\d+(?:\.\d+)?\**(?: ?(?:/|out of) ?\d+(?:\.\d+)?\**)?"
    score = "|".join([number, *(rf"{re.escape(text.strip())}\**" for text in texts)])
    # White space is one space each by now: nothing here can be matched in two ways.
    behind = " ".join(feedback[last.end() : end].split())
    verdict = re.fullmatch(rf"(?:score)? ?:? ?(?:\**(?:{score}))?", behind, re.IGNORECASE)
    return (feedback if verdict is None else feedback[: last.start()]).strip()
