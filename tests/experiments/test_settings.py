"""The settings of an experiment, and of the committed ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.launch import gradings
from experiments.results import evaluations
from experiments.settings import load
from real_fast.config import Config, cli
from real_fast.errors import ConfigError, OutputError
from real_fast.methods.registry import METHODS
from tests.experiments.tiny import TINY, written

ROOT = Path(__file__).resolve().parents[2]
# What is tried where REAL does not win.
REMEDIES = {"real_cosine", "real_more_prompts"}
COMMITTED = sorted((ROOT / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_methods_that_sample_differ_by_the_objective_alone(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REAL_FAST_05B", "model")
    experiment = load(path, tmp_path)
    methods = {m: cli.from_namespace(Config, experiment.config(m, 0, tmp_path)) for m in experiment.methods}
    real = methods["real"]
    assert methods["base"].train.steps == 0 and {"sft", "raft", "binary_rl", "real"} <= methods.keys()
    for name, config in methods.items():
        assert config.seed == 0 and config.output == str(tmp_path / "runs" / f"{name}-0")
        assert (config.prompt, config.data.eval) == (real.prompt, real.data.eval)
        assert config.rollout == real.rollout or name == "real_more_prompts"
        if config.train.steps and METHODS[config.method].uses_rollouts:
            assert config.init_from == str(tmp_path / "runs" / ("sft_1.7b-0" if "1.7b" in name else "sft-0"))
            assert config.optim.schedule == real.optim.schedule or name in REMEDIES
            assert config.train == real.train
            assert config.data == real.data or name == "real_saf"
        # STS-B has no feedback: what is trained on feedback gets none of its rows.
        if config.train.steps and config.method in ("sft", "tract"):
            assert experiment.rows_of(name) == ["saf"]


def test_the_experiment_of_the_page(tmp_path: Path) -> None:
    """What docs/experiment.md plans."""
    experiment = load(ROOT / "experiments" / "cpu.yaml", tmp_path)
    seeds = {method: experiment.seeds_of(method) for method in experiment.methods}
    assert seeds.pop("base") == [0]
    assert {m for m, some in seeds.items() if len(some) == 5} == {"sft", "real", "binary_rl"}
    assert {m for m, some in seeds.items() if len(some) < 3} == {"real_saf", "raft_saf", "real_more_prompts"}
    methods = {m: cli.from_namespace(Config, experiment.config(m, 1, tmp_path)) for m in experiment.methods}
    assert methods["real"].train.steps >= 100 and methods["real"].objective.kl_every == 10
    assert methods["real_reference"].objective.reward == "authors" and not methods["real_no_refinement"].objective.beta
    assert not methods["real_no_exploration"].objective.exploration
    assert (experiment.primary.benchmarks, experiment.primary.resamples) == (["saf", "stsb"], 10_000)
    assert all(len(rates) == 3 for rates in experiment.search.lr.values())
    rows = {
        m: c.train.steps * (c.rollout if METHODS[c.method].uses_rollouts else c.supervised).prompts_per_step
        for m, c in methods.items()
    }
    assert rows["real"] == rows["binary_rl"] == rows["sft_longer"]
    rollouts = {m: rows[m] * methods[m].rollout.group_size for m in ("real", *REMEDIES)}
    assert len(set(rollouts.values())) == 1
    assert min(rows["raft"], 2 * rows["tract"]) >= rows["sft"] + rows["real"]


def test_a_method_is_graded_where_a_question_asks_for_it(tmp_path: Path) -> None:
    methods = {**TINY["methods"], "longer": {"method": "sft", "graded_on": ["seen"]}}
    experiment = load(written(tmp_path / "e.yaml", methods=methods), tmp_path)
    assert (experiment.graded_on("longer"), experiment.graded_on("real")) == (["seen"], ["seen", "new"])
    assert list(gradings(experiment, tmp_path, "longer", 0)["test"]["data"]) == ["seen"]
    rows = {name: [{"id": name, "prompt_id": name, "score": 1.0}] for name in ("seen", "new")}
    runs = {
        (m, 0): {"updates": 1, "test": {b: {b: [2.0]} for b in experiment.graded_on(m)}} for m in ("longer", "real")
    }
    found = [(e.method, e.benchmark) for e in evaluations(experiment, runs, rows)]
    assert found == [("longer", "seen"), ("real", "seen"), ("real", "new")]
    with pytest.raises(OutputError, match="longer: 1 rows of seen have no prediction, such as seen"):
        evaluations(experiment, {("longer", 0): {"updates": 1, "test": {"new": {"new": [2.0]}}}}, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": [0]}, "seed"),
        ({"data": {"source": {}}}, "sources"),
        ({"data": {"sources": {"seen": {"path": "x"}}}}, r"data\.sources\.seen must have the keys"),
        ({"data": {"sources": {"new": {"file": "x"}}}}, "nothing would be trained on"),
        ({"data": {"sources": {"seen": {"file": "x", "train": ["a"], "dev_share": 0.1}}}}, "share a split"),
        ({"methods": {"base": {}, "real": {"init_from": "sft"}, "sft": {}}}, "real starts from sft, which must stand"),
        ({"methods": {**TINY["methods"], "sft": {"method": "best"}}}, "(?s)sft: .*best"),
        ({"methods": {**TINY["methods"], "sft": {"optim": {"lr": -1.0}}}}, "sft: optim.lr is -1.0"),
        ({"methods": {**TINY["methods"], "sft": {"seeds": [0]}}}, "real starts from sft, which has no seed 1"),
        ({"methods": {**TINY["methods"], "sft": {"train_on": ["new"]}}}, "sft trains on new, of which nothing"),
        ({"methods": {**TINY["methods"], "sft": {"graded_on": ["old"]}}}, "sft is graded on old, and there is no such"),
        (
            {"methods": {**TINY["methods"], "base": {"graded_on": ["seen"]}}},
            "primary asks for base on new, which it is",
        ),
        ({"seeds": [1, 1]}, "each once"),
        ({"baseline": "best"}, "baseline best is not among"),
        ({"primary": {"benchmarks": ["old"], "others": []}}, "primary names the benchmark old"),
        ({"questions": {"q": {"benchmarks": ["new"], "pairs": [["real", "rael"]]}}}, "q names the method rael"),
        ({"search": {"lr": {"raft": [1.0]}}}, "search names the method raft"),
        ({"common": None}, "none under common"),
        ({"methods": {**TINY["methods"], "sft": {"train": {"steps": 0}}}}, "real starts from sft, which has no seed 1"),
    ],
)
def test_mistakes_are_said_before_the_work(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(written(tmp_path / "e.yaml", **change), tmp_path)
