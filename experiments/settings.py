"""What an experiment consists of, read from its YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from real_fast.config import Config, cli
from real_fast.errors import ConfigError
from real_fast.methods.registry import check_config

# In the folder of the runs.
TEMPLATE = Path("data") / "template.jinja"


@dataclass
class Data:
    """The rows.

    Attributes:
        train: Files that are split by prompt into training rows and held-out ones, each a benchmark of its own.
        unseen: Files of which nothing is trained on.
        test_share: Share of the prompts of `train` that is held out.
        max_unseen: At most this many rows of each file of `unseen` (whole prompts); 0 for all.
        reference_answer: Whether prompts have the reference answer.
        rubric: "full", or its "question" alone, without the descriptions of the scores.
        sentences: Keep this many sentences of every feedback text; 0 for all.
    """

    train: list[str]
    unseen: list[str]
    test_share: float = 0.4
    max_unseen: int = 0
    reference_answer: bool = True
    rubric: str = "full"
    sentences: int = 0


@dataclass
class Experiment:
    """An experiment.

    Attributes:
        seeds: One run a seed and method.
        data: See :class:`Data`.
        common: Settings of ``real_fast.train`` that all methods share.
        methods: By name, what a method changes in `common`; ``init_from`` names another method, whose run of the same
            seed is where it starts.
        baseline: Method that the table compares the others with.
        beside: Folder of the YAML file, where a prompt template of the experiment's own is.
        reduced: What was left out for want of computing time, a sentence each; it goes into the results.
    """

    seeds: list[int]
    data: Data
    common: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    baseline: str = "real"
    reduced: list[str] = field(default_factory=list)
    beside: Path = Path()

    def config(self, method: str, seed: int, folder: Path) -> dict[str, Any]:
        """Settings of one run, as its YAML file has them; runs and data are in `folder`."""
        own = dict(self.methods[method])
        if own.get("init_from") is not None:
            own["init_from"] = str(run_folder(folder, own["init_from"], seed))
        data = {"train": str(folder / "data" / "train.jsonl"), "eval": str(folder / "data" / "test.jsonl")}
        last = {"output": str(run_folder(folder, method, seed)), "seed": seed, "data": data}
        if self.template() is not None:
            last["prompt"] = {"template": str(folder / TEMPLATE)}
        return merged(merged(self.common, own), last)

    def order(self) -> list[tuple[str, int]]:
        """Runs (method, seed) as they are made: every method's seeds in a row, each behind what it starts from.

        What is not trained has one run: its greedy feedback does not depend on the seed.
        """
        return [(method, seed) for method in self.methods for seed in self._seeds(method)]

    def starts(self, method: str) -> list[str]:
        """What a method starts from, and what that starts from, nearest first."""
        start = self.methods[method].get("init_from")
        return [] if start is None else [start, *self.starts(start)]

    def template(self) -> str | None:
        """Text of the experiment's own prompt template; runs use a copy. None for one of the package."""
        name = self.common.get("prompt", {}).get("template")
        file = self.beside / str(name)
        return file.read_text(encoding="utf-8") if name and file.is_file() else None

    def _seeds(self, method: str) -> list[int]:
        config = merged(self.common, self.methods[method])
        untrained = config.get("train", {}).get("steps") == 0 and not config.get("warmup", {}).get("steps")
        return self.seeds[:1] if untrained and config.get("eval", {}).get("temperature") == 0 else self.seeds


def run_folder(folder: Path, method: str, seed: int) -> Path:
    """Where a run is."""
    return folder / "runs" / f"{method}-{seed}"


def load(path: Path, folder: Path) -> Experiment:
    """Read an experiment and check the settings of all its runs.

    Args:
        path: The YAML file.
        folder: Where its runs will be.

    Raises:
        ConfigError: The file is missing or does not fit; the message says which run and which setting.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(given, dict) or not isinstance(given.get("common"), dict):
        raise ConfigError(f"{path} holds no settings, or none under common")
    if isinstance(given.get("methods"), dict):
        given["methods"] = {name: own or {} for name, own in given["methods"].items()}  # "sft:" alone changes nothing
    data = _build(Data, given.pop("data", None), f"{path}: data")
    experiment: Experiment = _build(Experiment, {**given, "data": data}, str(path))
    _check(experiment, path)
    experiment.beside = path.parent
    done: set[str] = set()
    for method, own in experiment.methods.items():
        start = own.get("init_from")
        if start is not None and start not in done:
            raise ConfigError(f"{path}: {method} starts from {start}, which must stand above it")
        runs = {m for m, seed in experiment.order() if seed == experiment.seeds[-1]}
        if start is not None and method in runs and start not in runs:
            raise ConfigError(f"{path}: {method} starts from {start}, which is not trained: leave init_from out")
        done.add(method)
        check = experiment.config(method, experiment.seeds[0], folder)
        try:
            check_config(cli.from_namespace(Config, {**check, "init_from": None}))
        except Exception as error:  # jsonargparse raises several kinds
            raise ConfigError(f"{path}: {method}: {error}") from error
    return experiment


def _check(experiment: Experiment, path: Path) -> None:
    """What the types do not say."""
    seeds, data = experiment.seeds, experiment.data
    problems = {
        f"seeds is {seeds}: at least one is needed, each once": not seeds or len(set(seeds)) < len(seeds),
        f"baseline {experiment.baseline} is not among the methods": experiment.baseline not in experiment.methods,
        f'data.rubric is {data.rubric!r}: "full" or "question"': data.rubric not in ("full", "question"),
        f"data.test_share is {data.test_share}: it must lie between 0 and 1": not 0 < data.test_share < 1,
        "data.train names no file": not data.train,
        "common.model is not set": not experiment.common.get("model"),
    }
    for problem, found in problems.items():
        if found:
            raise ConfigError(f"{path}: {problem}")


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `change`, nested dictionaries merged alike."""
    out = dict(base)
    for key, value in change.items():
        old = out.get(key)
        out[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def _build(kind: Any, given: Any, where: str) -> Any:
    known = [f.name for f in fields(kind)]
    if not isinstance(given, dict) or set(given) - set(known):
        extra = sorted(set(given) - set(known)) if isinstance(given, dict) else []
        raise ConfigError(f"{where} must have the keys {', '.join(known)}" + (f", and has {extra}" if extra else ""))
    try:
        return kind(**given)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error
