"""Where the experiment's rows come from, and how they are shortened."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")


@dataclass
class Source:
    """Rows of one file. Each source is a benchmark; what has `train` is trained on too.

    Attributes:
        file: Its name in the folder of the data.
        train: Values of the rows' ``split`` of which are trained on, and of dev rows.
        test: Values of ``split`` of the rows that are graded; empty for all.
        test_share: Share of the prompts that is held out; 0 where `train` and `test` lie apart in the file.
        dev_share: Share of the prompts whose rows are dev rows.
        train_rows: At most so many, chosen by a hash of their ids; 0 for all.
        dev_rows: The same of the dev rows.
        test_rows: The same of the graded rows.
        apart: Fields of which no text may be in a held-out row and in a training row, whichever of the fields it is in.
        near: Fields whose joined text is searched for near-duplicates across the split.
        drop_near: Leave out what has a near-duplicate among held-out rows; without it, they are counted alone.
        rescale: Ends of the labels' scale, [0, 5], where it is not 1 to 5.
        rubric: Text of the rubric in place of the rows' own.
        reference_words: Keep so many words of the reference answer, none for 0; all where it is not given.
    """

    file: str
    train: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    test_share: float = 0.0
    dev_share: float = 0.0
    train_rows: int = 0
    dev_rows: int = 0
    test_rows: int = 0
    apart: list[str] = field(default_factory=lambda: ["instruction"])
    near: list[str] = field(default_factory=list)
    drop_near: bool = False
    rescale: list[float] = field(default_factory=list)
    rubric: str = ""
    reference_words: int | None = None


@dataclass
class Data:
    """The rows.

    Attributes:
        sources: See :class:`Source`; by name.
        averaged_rows: Of each benchmark of the primary test, rows that several feedbacks are sampled for.
        rubric: "full", or its "question" alone, without the descriptions of the scores.
        sentences: Keep this many sentences of every feedback text; 0 for all.
        near: Cosine of two texts' TF-IDF vectors from which on they are near-duplicates.
    """

    sources: dict[str, Source]
    averaged_rows: int = 0
    rubric: str = "full"
    sentences: int = 0
    near: float = 0.9

    @property
    def trained(self) -> list[str]:
        """Names of the sources that are trained on."""
        return [name for name, source in self.sources.items() if source.train]


def problems_of(data: Data) -> dict[str, bool]:
    """Sentences about what cannot be, and whether it is so."""
    found = {
        f'data.rubric is {data.rubric!r}: "full" or "question"': data.rubric not in ("full", "question"),
        "data.sources has none with train: nothing would be trained on": not data.trained,
    }
    for name, s in data.sources.items():
        where = f"data.sources.{name}"
        shares = f"{where}: test_share is {s.test_share} and dev_share {s.dev_share}"
        found |= {
            f"{shares}: both must lie between 0 and 1, and their sum below 1": not (
                s.test_share >= 0 and s.dev_share >= 0 and s.test_share + s.dev_share < 1
            ),
            f"{where}: dev_share is 0, and what is trained on needs dev rows": bool(s.train) and not s.dev_share,
            f"{where}: train and test share a split, and test_share is 0": not s.test_share
            and bool(s.train)
            and (not s.test or bool(set(s.train) & set(s.test))),
            f"{where}.rescale is {s.rescale}: two numbers, the lower first": bool(s.rescale)
            and (len(s.rescale) != 2 or s.rescale[0] >= s.rescale[1]),
        }
    return found


def shortened(row: dict[str, Any], data: Data, source: Source) -> dict[str, Any]:
    """The row without what the experiment leaves out, its label on the scale from 1 to 5."""
    out = dict(row)
    if source.reference_words == 0:
        out.pop("reference_answer", None)
    elif source.reference_words and out.get("reference_answer"):
        out["reference_answer"] = " ".join(out["reference_answer"].split()[: source.reference_words])
    if source.rubric:
        out["rubric"] = source.rubric
    elif data.rubric == "question":
        out["rubric"] = row["rubric"].partition("\n")[0].strip().strip("[]")
    if data.sentences and row.get("feedbacks"):
        out["feedbacks"] = [" ".join(_END.split(text.strip())[: data.sentences]) for text in row["feedbacks"]]
    if source.rescale:
        low, high = source.rescale
        out["score"] = 1 + 4 * (row["score"] - low) / (high - low)
    return out
