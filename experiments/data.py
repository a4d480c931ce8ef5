"""The experiment's rows: training, dev and graded ones that share no prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.duplicates import nearest
from experiments.settings import Experiment
from experiments.sources import Data, Source, shortened
from real_fast.config import PromptConfig
from real_fast.data.dataset import Rejected, load_rows, reason_counts
from real_fast.errors import DataError
from real_fast.prompt.builder import PromptBuilder
from real_fast.score.scale import ScoreScale
from real_fast.utils.jsonio import read_jsonl, write_json, write_jsonl

Row = dict[str, Any]
_EXAMPLES = 5


def prepare(
    experiment: Experiment, source: Path, folder: Path, prompt: PromptConfig, builder: PromptBuilder, scale: ScoreScale
) -> Path:
    """Write train-NAME.jsonl, dev-NAME.jsonl, test-NAME.jsonl and split.json into `folder`; what is there stays.

    Which prompts are held out is a function of their ids alone, so all seeds and all sizes of the experiment hold out
    the same ones. Rows whose prompt is longer than ``prompt.max_tokens`` are left out and counted in split.json.

    Args:
        experiment: Whose `data` says what to do.
        source: Folder of the files.
        folder: Where to write.
        prompt: Of the runs.
        builder: Makes the prompts, to know their lengths.
        scale: The score scale.

    Returns:
        split.json: {"counts": {source: ...}, "fingerprint": of all rows that were written, "settings": of the data}.

    Raises:
        DataError: A file is missing, nothing of it is left for some use, or `folder` has rows of other settings.
    """
    split, settings = folder / "split.json", asdict(experiment.data) | {"max_tokens": prompt.max_tokens}
    if split.is_file():
        if json.loads(split.read_text(encoding="utf-8"))["settings"] != settings:
            raise DataError(f"{folder} has rows of other settings of data: take another --output, or remove it")
        return split
    folder.mkdir(parents=True, exist_ok=True)
    data, counts, digest = experiment.data, {}, hashlib.sha256()
    for name, one in data.sources.items():
        rejected: list[Rejected] = []
        rows = _fitting(data, one, source / one.file, folder, prompt, builder, scale, rejected)
        parts, dropped = divided(rows, one, data.near)
        needed = ("train", "dev", "test") if one.train else ("test",)
        if empty := [part for part in needed if not parts[part]]:
            raise DataError(f"{source / one.file}: no {empty[0]} rows of {name} are left of {len(rows)}")
        if name in experiment.primary.benchmarks and data.averaged_rows:
            parts["averaged"] = limited(parts["test"], data.averaged_rows)
        for part, some in parts.items():
            if some:
                file = folder / f"{part}-{name}.jsonl"
                write_jsonl(file, some)
                digest.update(file.name.encode() + file.read_bytes())
        counts[name] = {
            "rows": len(rows) + len(rejected),
            "left_out": reason_counts(rejected),
            **dropped,
            **{part: len(some) for part, some in parts.items()},
            "prompts": len({row["prompt_id"] for row in parts["test"]}),
        }
    write_json(split, {"counts": counts, "fingerprint": digest.hexdigest()[:16], "settings": settings})
    return split


def fingerprint(folder: Path) -> str:
    """Of the rows that :func:`prepare` wrote into `folder`."""
    return str(json.loads((folder / "split.json").read_text(encoding="utf-8"))["fingerprint"])


def divided(rows: list[Row], one: Source, near: float) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """Rows by what they are for, and what was dropped so that these stay apart.

    Args:
        rows: Of one source.
        one: What to do with them.
        near: See :class:`experiments.sources.Data`.

    Returns:
        {"train", "dev", "test"} and {"shared": dropped for a text that is held out, "near": {part: {"rows", "dropped",
        "examples"}}}.
    """
    graded = [row for row in rows if not one.test or row.get("split") in one.test]
    if not one.train:
        return {"train": [], "dev": [], "test": limited(graded, one.test_rows)}, {"shared": 0, "near": {}}
    trained = [row for row in rows if row.get("split") in one.train]
    end = one.test_share + one.dev_share
    held = [row for row in graded if not one.test_share or place(row["prompt_id"]) < one.test_share]
    dev = [row for row in trained if one.test_share <= place(row["prompt_id"]) < end]
    train = [row for row in trained if place(row["prompt_id"]) >= end]
    found: dict[str, Any] = {"shared": 0, "near": {}}

    # Of all that could be graded, not only of what is: nobody who grades more of it later grades what was trained on.
    dev = _apart(dev, held, one, near, "dev to test", found)
    dev = limited(dev, one.dev_rows)
    train = _apart(train, held, one, near, "train to test", found)
    train = _apart(train, dev, one, near, "train to dev", found)
    return {"train": limited(train, one.train_rows), "dev": dev, "test": limited(held, one.test_rows)}, found


def _apart(
    rows: list[Row], held_out: list[Row], one: Source, near: float, what: str, found: dict[str, Any]
) -> list[Row]:
    """Rows that share no text with those held out; `found` gets what was dropped."""
    texts = {_plain(row[key]) for row in held_out for key in one.apart}
    kept = [row for row in rows if not any(_plain(row[key]) in texts for key in one.apart)]
    found["shared"] += len(rows) - len(kept)
    if not (one.near and kept and held_out):
        return kept
    mine, theirs = ([" ".join(_plain(row[key]) for key in one.near) for row in some] for some in (kept, held_out))
    closest = nearest(mine, theirs)
    alike = {row["id"]: held_out[i]["id"] for row, (i, c) in zip(kept, closest, strict=True) if c >= near}
    found["near"][what] = {
        "rows": len(alike),
        "dropped": len(alike) if one.drop_near else 0,
        "examples": sorted(alike.items())[:_EXAMPLES],
    }
    return [row for row in kept if row["id"] not in alike] if one.drop_near else kept


def _fitting(
    data: Data,
    one: Source,
    path: Path,
    folder: Path,
    prompt: PromptConfig,
    builder: PromptBuilder,
    scale: ScoreScale,
    rejected: list[Rejected],
) -> list[Row]:
    """The file's rows of this source, shortened, that a run would not reject; `rejected` gets the others."""
    if not path.is_file():
        raise DataError(
            f"{path} is missing: name the folder of the experiment's files with --data or $REAL_FAST_DATA "
            "(docs/experiment.md says what they are)"
        )
    used = {*one.train, *one.test} if one.test else set()
    rows = [shortened(row, data, one) for row in read_jsonl(path) if not used or row.get("split") in used]
    if len({row["id"] for row in rows}) < len(rows):
        raise DataError(f"{path}: an id occurs twice")
    copy = folder / f"{path.stem}.tmp.jsonl"
    write_jsonl(copy, rows)
    fitting = {row.id for row in load_rows(str(copy), "", builder, scale, prompt.max_tokens, rejected)}
    copy.unlink()
    return [row for row in rows if row["id"] in fitting]


def place(text: str) -> float:
    """Where a text's hash lies, from 0 to 1."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def limited(rows: Sequence[Row], most: int) -> list[Row]:
    """At most so many rows, those whose ids' hashes come first, in the order of the file; 0 for all."""
    if not most or len(rows) <= most:
        return list(rows)
    taken = {row["id"] for row in sorted(rows, key=lambda row: (place(row["id"]), row["id"]))[:most]}
    return [row for row in rows if row["id"] in taken]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
