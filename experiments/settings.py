"""What an experiment consists of, read from its YAML file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from experiments.sources import Data, Source, problems_of
from real_fast.config import Config, cli
from real_fast.errors import ConfigError
from real_fast.methods.registry import check_config

# In the folder of the runs.
TEMPLATE = Path("data") / "template.jinja"
# What questions may name beside the methods: see experiments/baselines.py.
WITHOUT_MODEL = ("mean_label", "length", "overlap", "tfidf_ridge")
# Keys of a method that are the experiment's own; all others are settings of real_fast.train.
_OWN = ("train_on", "graded_on", "seeds")


@dataclass
class Averaged:
    """Whether the mean over several feedbacks beats one.

    Attributes:
        methods: Whose runs sample them, on every seed of ``Experiment.seeds``.
        feedbacks: How many a row, each number sampled anew.
    """

    methods: list[str] = field(default_factory=list)
    feedbacks: list[int] = field(default_factory=lambda: [1, 4, 8])


@dataclass
class Primary:
    """The test that was fixed before the runs.

    Attributes:
        benchmarks: The endpoint is the plain average of their Pearson correlations.
        others: Methods that the baseline is compared with, and for how many of which p is corrected.
        resamples: Of prompts and seeds.
    """

    benchmarks: list[str]
    others: list[str]
    resamples: int = 10_000


@dataclass
class Question:
    """Pairs of methods, compared on some benchmarks and, where there are several, on their average."""

    benchmarks: list[str]
    pairs: list[list[str]]


@dataclass
class Search:
    """The search of learning rates on the dev rows.

    Attributes:
        lr: Values by method.
        share: Share of the method's updates that each value gets.
    """

    lr: dict[str, list[float]] = field(default_factory=dict)
    share: float = 0.4


@dataclass
class Experiment:
    """An experiment.

    Attributes:
        seeds: One run a seed and method; a method's own ``seeds`` win.
        data: The rows.
        common: Settings of ``real_fast.train`` that all methods share.
        methods: By name, what a method changes in `common`. ``init_from`` names another method, whose run of the same
            seed is where it starts; ``train_on`` names the sources of its rows, ``graded_on`` the
            benchmarks that its runs are graded on; all of them where it is not given.
        primary: The planned test.
        questions: By name; see :class:`Question`.
        averaged: See :class:`Averaged`.
        search: See :class:`Search`.
        reach: RMSE on the dev rows, for which the cost to reach it is told.
        baseline: Method that the tables compare the others with.
        beside: Folder of the YAML file, where a prompt template of the experiment's own is.
        reduced: What was left out for want of computing time, a sentence each; it goes into the results.
    """

    seeds: list[int]
    data: Data
    common: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    primary: Primary
    questions: dict[str, Question] = field(default_factory=dict)
    averaged: Averaged = field(default_factory=Averaged)
    search: Search = field(default_factory=Search)
    reach: list[float] = field(default_factory=list)
    baseline: str = "real"
    reduced: list[str] = field(default_factory=list)
    beside: Path = Path()

    def config(self, method: str, seed: int, folder: Path) -> dict[str, Any]:
        """Settings of one run, as its YAML file has them; runs and data are in `folder`."""
        own = {key: value for key, value in self.methods[method].items() if key not in _OWN}
        if own.get("init_from") is not None:
            own["init_from"] = str(run_folder(folder, own["init_from"], seed))
        rows = folder / "data"
        data = {
            "train": [str(rows / f"train-{name}.jsonl") for name in self.rows_of(method)],
            "eval": {name: str(rows / f"dev-{name}.jsonl") for name in self.data.trained},
        }
        last = {"output": str(run_folder(folder, method, seed)), "seed": seed, "data": data, "model": self.model}
        if self.template() is not None:
            last["prompt"] = {"template": str(folder / TEMPLATE)}
        return merged(merged(self.common, own), last)

    @property
    def model(self) -> str:
        """The model, with variables of the environment in its path filled in."""
        return os.path.expandvars(str(self.common["model"]))

    def rows_of(self, method: str) -> list[str]:
        """Names of the sources that a method trains on."""
        return list(self.methods[method].get("train_on") or self.data.trained)

    def graded_on(self, method: str) -> list[str]:
        """Names of the benchmarks that a method's runs are graded on, in the order of the sources."""
        wanted = self.methods[method].get("graded_on")
        return [name for name in self.data.sources if wanted is None or name in wanted]

    def order(self) -> list[tuple[str, int]]:
        """Runs (method, seed) as they are made: seed by seed, so that what is stopped early has all methods.

        What is not trained has one run: its greedy feedback does not depend on the seed.
        """
        seeds = dict.fromkeys(seed for method in self.methods for seed in self.seeds_of(method))
        return [(method, seed) for seed in seeds for method in self.methods if seed in self.seeds_of(method)]

    def starts(self, method: str) -> list[str]:
        """What a method starts from, and what that starts from, nearest first."""
        start = self.methods[method].get("init_from")
        return [] if start is None else [start, *self.starts(start)]

    def template(self) -> str | None:
        """Text of the experiment's own prompt template; runs use a copy. None for one of the package."""
        name = self.common.get("prompt", {}).get("template")
        file = self.beside / str(name)
        return file.read_text(encoding="utf-8") if name and file.is_file() else None

    def seeds_of(self, method: str) -> list[int]:
        """Seeds of a method's runs."""
        config = merged(self.common, self.methods[method])
        seeds: list[int] = config.get("seeds") or self.seeds
        untrained = config.get("train", {}).get("steps") == 0 and not config.get("warmup", {}).get("steps")
        return seeds[:1] if untrained and config.get("eval", {}).get("temperature") == 0 else seeds

    def feedbacks(self, method: str, seed: int) -> list[int]:
        """How many feedbacks a run samples a row, beside the greedy one."""
        return self.averaged.feedbacks if method in self.averaged.methods and seed in self.seeds else []


def run_folder(folder: Path, method: str, seed: int) -> Path:
    """Where a run is."""
    return folder / "runs" / f"{method}-{seed}"


def protocol_of(experiment: Experiment, method: str) -> str:
    """The protocol that a method's runs are evaluated by."""
    return str(merged(experiment.common, experiment.methods[method]).get("eval", {}).get("protocol", "real"))


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
    given["data"] = _build(Data, given.get("data"), f"{path}: data")
    for name, source in given["data"].sources.items():
        given["data"].sources[name] = _build(Source, source, f"{path}: data.sources.{name}")
    for key, kind in {"primary": Primary, "averaged": Averaged, "search": Search}.items():
        if key in given:
            given[key] = _build(kind, given[key], f"{path}: {key}")
    for name, question in given.get("questions", {}).items():
        given["questions"][name] = _build(Question, question, f"{path}: questions.{name}")
    experiment: Experiment = _build(Experiment, given, str(path))
    _check(experiment, path)
    experiment.beside = path.parent
    done: list[str] = []
    for method, own in experiment.methods.items():
        start = own.get("init_from")
        if start is not None and start not in done:
            raise ConfigError(f"{path}: {method} starts from {start}, which must stand above it")
        if start and (lacking := set(experiment.seeds_of(method)) - set(experiment.seeds_of(start))):
            raise ConfigError(f"{path}: {method} starts from {start}, which has no seed {min(lacking)}")
        done.append(method)
        check = experiment.config(method, experiment.seeds[0], folder)
        try:
            check_config(cli.from_namespace(Config, {**check, "init_from": None}))
        except Exception as error:  # jsonargparse raises several kinds
            raise ConfigError(f"{path}: {method}: {error}") from error
    return experiment


def _check(experiment: Experiment, path: Path) -> None:
    """What the types do not say."""
    e, methods, benchmarks = experiment, experiment.methods, set(experiment.data.sources)
    problems = {
        f"seeds is {e.seeds}: at least one is needed, each once": not e.seeds or len(set(e.seeds)) < len(e.seeds),
        f"baseline {e.baseline} is not among the methods": e.baseline not in methods,
        "common.model is not set": not e.common.get("model"),
        f"common.model is {e.common.get('model')}: set that variable": "$"
        in os.path.expandvars(str(e.common.get("model"))),
        **problems_of(e.data),
    }
    questions = {**e.questions, "primary": Question(e.primary.benchmarks, [[e.baseline, m] for m in e.primary.others])}
    named = {
        "averaged": e.averaged.methods,
        "search": list(e.search.lr),
        **{name: [method for pair in question.pairs for method in pair] for name, question in questions.items()},
    }
    for name, some in named.items():
        for method in some:
            problems[f"{name} names the method {method}, and there is none"] = method not in [
                *methods,
                *(WITHOUT_MODEL if name in e.questions else ()),
            ]
    for method, own in methods.items():
        problems[f"{method} is graded on nothing: leave graded_on out, or name a benchmark"] = (
            own.get("graded_on") == []
        )
        for benchmark in own.get("graded_on") or []:
            problems[f"{method} is graded on {benchmark}, and there is no such benchmark"] = benchmark not in benchmarks
    for name, question in questions.items():
        for benchmark in question.benchmarks:
            problems[f"{name} names the benchmark {benchmark}, and there is none"] = benchmark not in benchmarks
            for method in dict.fromkeys(method for pair in question.pairs for method in pair if method in methods):
                problem = f"{name} asks for {method} on {benchmark}, which it is not graded on (graded_on)"
                problems[problem] = benchmark in benchmarks and benchmark not in e.graded_on(method)
        problems[f"{name} has a pair that is not of two methods"] = any(len(pair) != 2 for pair in question.pairs)
    for method in methods:
        for source in e.rows_of(method):
            problems[f"{method} trains on {source}, of which nothing is trained on"] = source not in e.data.trained
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
