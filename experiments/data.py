"""The experiment's rows: a split by prompt, and what was shortened in them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

from experiments.settings import Data
from real_fast.config import PromptConfig
from real_fast.data.dataset import Rejected, load_rows, reason_counts
from real_fast.errors import DataError
from real_fast.prompt.builder import PromptBuilder
from real_fast.score.scale import ScoreScale
from real_fast.utils.jsonio import read_jsonl, write_json, write_jsonl

_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")


def prepare(data: Data, source: Path, folder: Path, prompt: PromptConfig, builder: Any, scale: ScoreScale) -> Path:
    """Write train.jsonl, test.jsonl and split.json into `folder`; what is there already stays.

    The split is a function of the prompts' ids alone, so all seeds and all sizes of the experiment hold out the same
    prompts. Rows whose prompt is longer than ``prompt.max_tokens`` are left out and counted in split.json.

    Args:
        data: What to do.
        source: Folder of the files.
        folder: Where to write.
        prompt: Of the runs.
        builder: Makes the prompts, to know their lengths.
        scale: The score scale.

    Returns:
        split.json: {"benchmarks": {benchmark: [row ids]}, "counts": ...}.

    Raises:
        DataError: A file is missing, or nothing of it fits.
    """
    split = folder / "split.json"
    if split.is_file():
        return split
    folder.mkdir(parents=True, exist_ok=True)
    train: list[dict[str, Any]] = []
    test: list[dict[str, Any]] = []
    benchmarks: dict[str, list[str]] = {}
    counts: dict[str, dict[str, Any]] = {}
    for name in [*data.train, *data.unseen]:
        rejected: list[Rejected] = []
        rows = _fitting(data, source / name, folder, prompt, builder, scale, rejected)
        seen = name in data.train
        held_out = _held_out(rows, data.test_share) if seen else {row["prompt_id"] for row in rows}
        mine = [row for row in rows if row["prompt_id"] in held_out]
        if not seen:
            mine = _limited(mine, data.max_unseen)
        rest = [row for row in rows if row["prompt_id"] not in held_out]
        if not mine or (seen and not rest):
            raise DataError(f"{source / name}: {len(mine)} rows to test on and {len(rest)} to train on are left")
        benchmark = Path(name).stem
        benchmarks[benchmark] = [row["id"] for row in mine]
        counts[benchmark] = {
            "rows": len(rows) + len(rejected),
            "left_out": reason_counts(rejected),
            "train": len(rest),
            "test": len(mine),
        }
        train += rest
        test += mine
    if twice := [i for i, n in Counter(row["id"] for row in train + test).items() if n > 1]:
        raise DataError(f"the id {twice[0]!r} is in two files")
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "test.jsonl", test)
    write_json(split, {"benchmarks": benchmarks, "counts": counts})
    return split


def _fitting(
    data: Data,
    path: Path,
    folder: Path,
    prompt: PromptConfig,
    builder: PromptBuilder,
    scale: ScoreScale,
    rejected: list[Rejected],
) -> list[dict[str, Any]]:
    """The file's rows, shortened, that a run would not reject; `rejected` gets the others."""
    if not path.is_file():
        raise DataError(
            f"{path} is missing: name the folder of the experiment's files with --data or $REAL_FAST_DATA "
            "(docs/experiment.md says what they are)"
        )
    rows = [shortened(row, data) for row in read_jsonl(path)]
    copy = folder / f"{path.stem}.tmp.jsonl"
    write_jsonl(copy, rows)
    fitting = {row.id for row in load_rows(str(copy), "", builder, scale, prompt.max_tokens, rejected)}
    copy.unlink()
    return [row for row in rows if row["id"] in fitting]


def shortened(row: dict[str, Any], data: Data) -> dict[str, Any]:
    """The row without what the experiment leaves out."""
    out = dict(row)
    if not data.reference_answer:
        out.pop("reference_answer", None)
    if data.rubric == "question":
        out["rubric"] = row["rubric"].partition("\n")[0].strip().strip("[]")
    if data.sentences and row.get("feedbacks"):
        out["feedbacks"] = [" ".join(_END.split(text.strip())[: data.sentences]) for text in row["feedbacks"]]
    return out


def _order(prompt_id: str) -> bytes:
    return hashlib.sha256(prompt_id.encode()).digest()


def _held_out(rows: list[dict[str, Any]], share: float) -> set[str]:
    """Each prompt by itself, so that it is held out whichever other rows are there."""
    return {row["prompt_id"] for row in rows if int.from_bytes(_order(row["prompt_id"])[:4], "big") < share * 2**32}


def _limited(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Whole prompts, at most so many rows."""
    if not most:
        return rows
    taken: set[str] = set()
    left = most
    sizes = Counter(row["prompt_id"] for row in rows)
    for prompt in sorted(sizes, key=_order):
        if sizes[prompt] <= left:
            taken.add(prompt)
            left -= sizes[prompt]
    return [row for row in rows if row["prompt_id"] in taken]
