"""The rows of the published table: each is what its name says, fits where planned, and has its place on the page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from real_fast.config.cli import load
from tools import paper_tables

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "paper"
FILES = paper_tables.rows(CONFIGS)
MODELS = ("mistral-7b", "qwen3-8b", "qwen3-32b")
METHODS = ("raft", "tract", "binary-rl", "real", "real-authors")
ABLATIONS = {
    "lam-0": ("objective.lam", 0),
    "lam-0.1": ("objective.lam", 0.1),
    "lam-10": ("objective.lam", 10),
    "beta-0": ("objective.beta", 0),
    "beta-0.01": ("objective.beta", 0.01),
    "beta-0.1": ("objective.beta", 0.1),
    "k-4": ("rollout.group_size", 4),
    "k-16": ("rollout.group_size", 16),
    "baseline-mean": ("objective.baseline", "mean"),
}


def settings(name: str) -> dict[str, Any]:
    """Every setting of a row, by its key."""
    sections = dataclasses.asdict(load(CONFIGS / f"{name}.yaml"))
    one = {key: value for key, value in sections.items() if not isinstance(value, dict)}
    return one | {f"{s}.{key}": v for s, part in sections.items() if isinstance(part, dict) for key, v in part.items()}


def differ(one: str, other: str) -> dict[str, Any]:
    """The settings of `other` that are not those of `one`."""
    before, after = settings(one), settings(other)
    return {key: value for key, value in after.items() if before[key] != value}


def test_every_row_that_can_be_run_is_there() -> None:
    names = {f"{model}-{method}" for model in MODELS for method in METHODS}
    assert {path.stem for path in FILES} == names | {f"qwen3-8b-real-{name}" for name in ABLATIONS}
    assert paper_tables.PUBLISHED.keys() <= names | {"qwen3-32b-base"}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_one_setting_and_its_header_says_which(name: str) -> None:
    key, value = ABLATIONS[name]
    assert differ("qwen3-8b-real", f"qwen3-8b-real-{name}") == {key: value}
    header = (CONFIGS / f"qwen3-8b-real-{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert f"qwen3-8b-real.yaml, but for {key} {value}" in header.removesuffix(".0.").removesuffix(".")


@pytest.mark.parametrize("model", MODELS)
def test_methods_of_a_model_are_compared_on_the_same_terms(model: str) -> None:
    reward = {"objective.reward", "objective.beta", "objective.loss_norm", "rollout.top_p"}
    assert differ(f"{model}-real", f"{model}-real-authors").keys() == reward
    assert differ(f"{model}-real", f"{model}-binary-rl") == {"method": "binary_rl"}
    rows = [settings(f"{model}-{method}") for method in METHODS]
    for key in ("model", "scale.values", "scale.phrase", "prompt.template", "prompt.system", "data.train", "data.eval"):
        assert all(row[key] == rows[0][key] for row in rows)
    assert list(rows[0]["data.eval"]) == list(paper_tables.BENCHMARKS)
    start = rows[3]["init_from"].removeprefix("runs/paper/")
    assert (CONFIGS / f"{start}.yaml") in FILES and settings(start)["save.merge"]


def test_a_row_stands_behind_the_one_that_it_starts_from() -> None:
    lines = paper_tables.commands(FILES).splitlines()
    assert len(lines) == len(FILES) + 2
    for path in FILES:
        if start := load(path).init_from:
            made = [n for n, line in enumerate(lines) if line.endswith(f"--output {start}")]
            assert made[0] < next(n for n, line in enumerate(lines) if f"/{path.name} " in line)


@pytest.mark.parametrize(
    "name", ["mistral-7b-tract", "mistral-7b-real", "qwen3-8b-real-k-16", "qwen3-32b-tract", "qwen3-32b-real"]
)
def test_the_plan_fits_where_the_page_has_it(name: str) -> None:
    config, plan = paper_tables.planned(CONFIGS / f"{name}.yaml")
    assert plan.need.fits and config.gpus == paper_tables.gpus(name)
    updates = config.train.steps * plan.seconds.total / 3600
    found = paper_tables.hours(config, plan)
    assert found > 2 * updates if config.method == "tract" else found == updates


def test_a_kept_result_stands_beside_what_was_published(tmp_path: Path) -> None:
    parts = {name: {"pearson": r} for name, r in zip(paper_tables.BENCHMARKS, (0.9, 0.5, None, 0.25), strict=True)}
    kept = {"pearson": 0.55, "benchmarks": parts}
    (tmp_path / "mistral-7b-raft.json").write_text(json.dumps(kept), encoding="utf-8")
    [row] = paper_tables.table([CONFIGS / "mistral-7b-raft.yaml"], tmp_path).splitlines()[2:]
    assert row.endswith("| 87.9 / 41.8 / 52.8 / 39.9 / 55.6 | 90.0 / 50.0 / - / 25.0 / 55.0 |")
