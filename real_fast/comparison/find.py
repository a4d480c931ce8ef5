"""Finds the evaluations that runs have left behind: which method, on which benchmark, with which predictions."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from real_fast.data.readers import may_be_on_hub
from real_fast.errors import NoEvaluationError
from real_fast.utils.jsonio import read_jsonl

# Settings that say where a run is, not what it does.
_OF_ONE_RUN = ("seed", "output", "resume", "overwrite", "run_name", "report_to", "log_level", "profile")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        method: Name of the run's folder, with as much of its path, protocol or number of feedbacks as tells it apart.
        benchmark: Name of the data; of one of them, where an evaluation is of several named ones.
        protocol: See :mod:`real_fast.score.protocol`.
        feedbacks: Feedbacks sampled per row.
        rows: Predictions with id, prompt_id, label and prediction (and ``key``, what the row's texts make up, where the
            evaluation wrote one), in the order of their ids.
        source: The file that they are in.
        owner: The run's folder, or the evaluation's own where it is not in a run.
        seed: Of the run, where the method's name does not tell it.
    """

    method: str
    benchmark: str
    protocol: str
    feedbacks: int
    rows: list[dict[str, Any]]
    source: Path
    owner: Path
    seed: int | None = None


def find_evaluations(folders: Sequence[str | Path]) -> tuple[list[Evaluation], list[str]]:
    """Every finished evaluation in the folders and below them: those of ``real-fast evaluate``, and runs' last ones.

    Args:
        folders: Runs, evaluations, or folders of them.

    Returns:
        The evaluations, in the order of the folders, and a sentence for everything that was passed over.

    Raises:
        NoEvaluationError: A folder does not exist, or none holds an evaluation.
    """
    for folder in folders:
        if not Path(folder).expanduser().exists():
            raise NoEvaluationError(f"{folder}: there is no such folder")
    found: dict[tuple[Path, str], Evaluation] = {}
    notes: list[str] = []
    for folder in folders:
        if Path(folder).expanduser().is_file():
            notes.append(f"{folder} is a file and is left out: name folders")
            continue
        before = len(notes)
        summaries = _summaries(Path(folder).expanduser())
        any_read = False
        for path, read in summaries:
            try:
                evaluations = read(path)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
                notes.append(f"{path} cannot be read and is left out: {type(error).__name__}: {error}")
                continue
            any_read = any_read or bool(evaluations)
            for e in evaluations:
                found.setdefault((e.source.resolve(), e.benchmark), e)
        if not any_read and len(notes) == before:
            notes.append(
                f"{folder} holds no finished evaluation (predictions.jsonl with summary.json, or eval/after.json with "
                "eval/after.predictions.jsonl) and is left out"
            )
    old = [key for key, e in found.items() if _overwritten(e, found.values())]
    notes += [
        f"{source} is of a run that was overwritten and is left out" for source in dict.fromkeys(s for s, _ in old)
    ]
    for key in old:
        del found[key]
    if not found:
        raise NoEvaluationError("; ".join(notes) or "no folder was given")
    return _named(_with_benchmarks(list(found.values()))), notes


def _summaries(folder: Path) -> list[tuple[Path, Callable[[Path], list[Evaluation]]]]:
    """Files that mark a finished evaluation, with what reads them."""
    own = sorted(folder.rglob("eval/after.json"))
    found: list[tuple[Path, Callable[[Path], list[Evaluation]]]] = []
    if folder.name == "eval" and (folder / "after.json").is_file():
        own.append(folder / "after.json")
    found += [(p, _of_run) for p in own]
    return found + [(p, _of_evaluate) for p in sorted(folder.rglob("summary.json"))]


def _overwritten(e: Evaluation, found: Iterable[Evaluation]) -> bool:
    """Whether it is of NAME.old-1 (see :mod:`real_fast.runs.folder`), with an evaluation of NAME beside it."""
    now = re.sub(r"\.old-\d+(?=/|$)", "", e.owner.as_posix())
    return now != e.owner.as_posix() and any(other.owner.as_posix() == now for other in found)


def _of_run(path: Path) -> list[Evaluation]:
    """A run's evaluation of its held-out rows after training."""
    run = path.parent.parent
    # The second stage of TRACT reads what the first one wrote; the first one's settings name the data.
    first = run / "stage1" / "config.yaml"
    config = first if first.is_file() else run / "config.yaml"
    data = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]
    benchmark = _data_name(data["eval"], data.get("eval_split")) if data.get("eval") else f"{data['train']} (held out)"
    summary = json.loads(path.read_text(encoding="utf-8"))
    return _load(summary, benchmark, path.with_name("after.predictions.jsonl"), run)


def _of_evaluate(path: Path) -> list[Evaluation]:
    """What real-fast evaluate wrote; none for a run's own summary, whose evaluation is in its eval folder."""
    summary = json.loads(path.read_text(encoding="utf-8"))
    predictions = path.with_name("predictions.jsonl")
    if "pearson" not in summary or not predictions.is_file():
        return []
    owner = next((parent for parent in path.resolve().parents if _is_run(parent)), path.parent)
    return _load(summary, _data_name(summary["data"], summary.get("split")), predictions, owner)


def _data_name(data: Any, split: str | None) -> str:
    """The file, or the hub dataset with its split; of several sources, all of them."""
    if isinstance(data, dict) and "path" in data:
        return _data_name(str(data["path"]), data.get("split", split))
    if not isinstance(data, str):
        return json.dumps(data, default=str)
    return f"{data} ({split})" if split and may_be_on_hub(data) else data


def _is_run(folder: Path) -> bool:
    """Whether a run made it: a folder above that merely has a folder of the name final is none."""
    return (folder / "metrics.jsonl").is_file() or (folder / "final" / "real_fast.json").is_file()


def _load(summary: dict[str, Any], benchmark: str, predictions: Path, owner: Path) -> list[Evaluation]:
    """The evaluation of a file of predictions, or one for each named benchmark that it has rows of."""
    rows = sorted(read_jsonl(predictions), key=lambda row: str(row["id"]))
    if not rows:
        raise ValueError("it has no rows")
    several: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        float(row["label"]), row["prompt_id"], row["prediction"]
        several.setdefault(row.get("benchmark") or benchmark, []).append(row)
    for some in several.values():
        if repeated := [i for i, count in Counter(row["id"] for row in some).items() if count > 1]:
            raise ValueError(f"the id {repeated[0]!r} stands there twice")
    about = (summary.get("protocol", "real"), int(rows[0].get("n", 1)))
    return [Evaluation("", name, *about, some, predictions, owner.resolve()) for name, some in several.items()]


def _with_benchmarks(found: list[Evaluation]) -> list[Evaluation]:
    """Name the benchmarks: the end of the data's path, as much as tells it from other data with other rows.

    Data of the very same rows is one benchmark, whatever its files are called; where the evaluations do not say what
    the rows hold (earlier ones had ids alone), only if the files have one name.
    """
    first: dict[str, Evaluation] = {}
    alike = {}
    for e in found:
        data = e.benchmark
        if data not in alike:
            same = (
                d
                for d, other in first.items()
                if in_order_of(other, e) and (_keyed(e, other) or _tail(Path(d), 1) == _tail(Path(data), 1))
            )
            alike[data] = next(same, data)
            first.setdefault(alike[data], e)
    names = _told_apart({Path(data): 1 for data in first})
    return [replace(e, benchmark=names[Path(alike[e.benchmark])]) for e in found]


def in_order_of(first: Evaluation, e: Evaluation) -> Evaluation | None:
    """`e` with its rows in the order of `first`, or None where these are not the very same rows and labels."""
    return among(first, e) if len(first.rows) == len(e.rows) else None


def among(whole: Evaluation, e: Evaluation) -> Evaluation | None:
    """`e` on the rows of `whole`, in their order: rows that it was not asked have no prediction.

    None where it has rows that `whole` has not, or other labels. Rows are known by what they hold, whatever ids a file
    gave them; by their ids where an evaluation has no keys.
    """
    keys = ("key",) if _keyed(whole, e) else ("id", "prompt_id")
    left: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in reversed(e.rows):
        left.setdefault(_identity(row, keys), []).append(row)
    rows = []
    for row in whole.rows:
        there = left.get(_identity(row, keys))
        rows.append(there.pop() if there else {**row, "prediction": None})
    return None if any(left.values()) else replace(e, rows=rows)


def _keyed(*evaluations: Evaluation) -> bool:
    return all("key" in row for e in evaluations for row in e.rows)


def _identity(row: dict[str, Any], keys: Sequence[str]) -> tuple[Any, ...]:
    """With the label to six digits, since files keep numbers in 32 or 64 bits."""
    return (*(row[key] for key in keys), f"{row['label']:.6g}")


def _named(found: list[Evaluation]) -> list[Evaluation]:
    """Short names that tell methods apart: by folder, then (within a benchmark) by protocol, then by file."""
    # A run's stage is named with the run.
    owners = _told_apart({e.owner: 2 if _is_run(e.owner.parent) else 1 for e in found})
    named = [replace(e, method=owners[e.owner]) for e in found]
    for tell in (
        lambda e: f"{e.method} ({e.protocol}, n={e.feedbacks})",
        lambda e: f"{e.method} [{e.source.resolve().relative_to(e.owner)}]",
    ):
        same = Counter((e.benchmark, e.method) for e in named)
        named = [replace(e, method=tell(e)) if same[e.benchmark, e.method] > 1 else e for e in named]
    return named


def pool_seeds(found: Sequence[Evaluation]) -> tuple[list[Evaluation], list[str]]:
    """One method's name for runs that differ by their seed alone.

    The names of their folders, and of those that they start from (``init_from``), end with the seed behind a separator:
    real-0, real_1, real/seed2. Every other setting is the same, and so are benchmark, protocol and number of feedbacks.

    Returns:
        The evaluations, pooled ones with the common name and their seed, and a sentence for every name that runs of
        different settings would share: these stay apart.
    """
    groups: dict[str, list[Evaluation]] = {}
    for e in found:
        key, bare = _without_seed(e)
        groups.setdefault(key, []).append(bare)
    pools = [same for same in groups.values() if len(same) > 1 and len({e.seed for e in same}) == len(same)]
    inside = {(e.source, e.benchmark) for same in pools for e in same}
    taken = Counter((e.benchmark, e.method) for e in found if (e.source, e.benchmark) not in inside)
    taken.update((same[0].benchmark, same[0].method) for same in pools)
    names = {(e.source, e.benchmark): e for e in found}
    notes = []
    for same in pools:
        benchmark, method = same[0].benchmark, same[0].method
        if taken[benchmark, method] > 1:
            each = ", ".join(names[e.source, e.benchmark].method for e in same)
            notes.append(
                f"{benchmark}: {each} are not pooled, since runs of other settings would be named {method} too"
            )
        else:
            names |= {(e.source, e.benchmark): e for e in same}
    return list(names.values()), notes


def _without_seed(e: Evaluation) -> tuple[str, Evaluation]:
    """What runs that may be pooled have in common, and the evaluation under their name."""
    file = e.owner / "config.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8")) if _is_run(e.owner) and file.is_file() else None
    if not isinstance(config, dict) or not isinstance(config.get("seed"), int):
        return json.dumps([str(e.source), e.benchmark]), e
    seed, output = config["seed"], str(config.get("output"))

    def bare(text: str) -> str:
        return re.sub(rf"[-_/](seed)?[-_]?{seed}(?=/|$|\s)", "", text)

    same = {k: v for k, v in config.items() if k not in _OF_ONE_RUN}
    same["init_from"] = bare(config.get("init_from") or "")
    name = bare(e.method)
    # TRACT's second stage reads rows and template that the first one left in its own folder.
    settings = json.dumps(same, sort_keys=True, default=str).replace(json.dumps(output)[1:-1] + "/", "")
    return json.dumps([name, e.benchmark, e.protocol, e.feedbacks, settings]), replace(e, method=name, seed=seed)


def _tail(path: Path, parts: int) -> str:
    return "/".join(path.parts[-parts:])


def _told_apart(parts: dict[Path, int]) -> dict[Path, str]:
    """Names of paths by their last parts, at least as many as given, and as many as tell them apart."""
    while True:
        names = {path: _tail(path, count) for path, count in parts.items()}
        count = Counter(names.values())
        repeated = [path for path in parts if count[names[path]] > 1 and parts[path] < len(path.parts)]
        if not repeated:
            return names
        for path in repeated:
            parts[path] += 1
