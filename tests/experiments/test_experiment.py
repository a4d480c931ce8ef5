"""The experiment's runs: going on where they stopped, on this machine or another, and their results."""

from __future__ import annotations

import gzip
import json
import shutil
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from experiments import baselines, launch, noise, record, results, run, search, timing
from experiments.settings import WITHOUT_MODEL, Experiment, load, run_folder
from real_fast import evaluate, train
from real_fast.utils.jsonio import read_jsonl, write_json, write_jsonl
from tests.experiments.tiny import TINY, rows, write_files, written
from tools import experiment_tables


class InThisThread:
    """A pool of no threads: what is submitted is done at once."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> InThisThread:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def submit(self, work: Any, *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done


def in_this_process(_self: Any, command: list[str], _said: Any) -> tuple[int, float]:
    """Save the seconds that a process takes to import."""
    work = {"real_fast.train": train.main, "real_fast.evaluate": evaluate.main}[command[2]]
    return work(command[3:]), 1.5


def kept(table: Path, name: str) -> dict[str, Any]:
    """The file of a finished run."""
    found: dict[str, Any] = json.loads(gzip.decompress((table / "runs" / f"{name}.json.gz").read_bytes()))
    return found


def test_an_experiment_from_its_files_to_its_table(
    tmp_path: Path, tiny_judge: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_files(tmp_path / "files")
    common = {**TINY["common"], "model": str(tiny_judge)}
    config = written(tmp_path / "e.yaml", common=common, seeds=[0])
    output, table = tmp_path / "out", tmp_path / "table"
    monkeypatch.setattr(results, "_BOOTSTRAP", 20)
    argv = ["--config", str(config), "--data", str(files), "--output", str(output), "--results", str(table)]
    assert run.main([*argv, "--results-only"]) == 2 and "no finished run yet" in capsys.readouterr().err
    monkeypatch.setattr(launch, "ThreadPoolExecutor", InThisThread)
    monkeypatch.setattr(launch.Processes, "run", in_this_process)
    assert run.main([*argv, "--methods", "base"]) == 0
    base = (table / "runs" / "base-0.json.gz").read_bytes()
    assert "not finished, and not in the table: sft-0, real-0" in capsys.readouterr().out
    assert run.main([*argv, "--methods", "real"]) == 0  # and sft, which it starts from
    printed = capsys.readouterr().out
    assert "| seen | real |" in printed and "| new | tfidf_ridge |" in printed
    assert (table / "runs" / "base-0.json.gz").read_bytes() == base
    assert {p.name for p in (output / "runs").iterdir()} == {"base-0", "sft-0", "real-0"}
    assert not list(output.rglob("checkpoints")) and (output / "runs" / "sft-0" / "final").is_dir()
    started = yaml.safe_load((output / "runs" / "real-0" / "config.yaml").read_text())["init_from"]
    assert started == str(output / "runs" / "sft-0")

    # What a run leaves: predictions by row, cost, curve; no text, no path.
    real, sft = kept(table, "real-0"), kept(table, "sft-0")
    ids = {b: [row["id"] for row in read_jsonl(output / "data" / f"test-{b}.jsonl")] for b in ("seen", "new")}
    assert {b: list(rows) for b, rows in real["test"].items()} == ids
    predicted = real["test"]["new"][ids["new"][0]]
    assert predicted[0] == pytest.approx(sum(k * p for k, p in enumerate(predicted[1:], 1)), abs=2e-3)
    assert real["averaged"].keys() == {"1", "2"} and len(real["averaged"]["2"]["new"]) == 6 and not sft["averaged"]
    assert real["start_weights"] == sft["weights"] != real["weights"] and sft["start_weights"] is None
    assert [point["step"] for point in real["curve"]] == [1, 2] and real["curve"][1]["rows"] == real["rows_seen"] == 4
    assert real["tokens_sampled"] == real["curve"][1]["tokens"] > real["curve"][0]["tokens"] > 0
    assert 0 < real["training_cpu_seconds"] < 1.5 and real["grading_cpu_seconds"] == 4.5
    assert [step for step, _ in real["kl"]] == [1, 2]
    assert str(tmp_path) not in json.dumps({key: value for key, value in real.items() if key != "settings"})

    found = json.loads((table / "summary.json").read_text())
    shame = {"mean_label", "length", "overlap", "tfidf_ridge"}
    assert {(r["method"], r["benchmark"]) for r in found["results"]} == {
        (m, b) for m in {"base", "sft", "real"} | shame for b in ("seen", "new")
    }
    assert all({"seed", "pearson", "spearman", "kendall", "rmse", "n"} <= r.keys() for r in found["results"])
    assert found["missing"] == [] and found["reduced"] == ["Everything."] and found["runs"]["sft-0"]["rows_seen"] == 4
    assert [line["other"] for line in found["primary"]] == ["sft", "base"] and found["primary"][0]["rows"] == 29
    values = {(r["method"], r["benchmark"]): r["rmse"] for r in found["results"]}
    gain = found["questions"]["halves"][0]["rmse"]["value"]
    assert gain == pytest.approx(values["real", "seen"] - values["sft", "seen"])
    assert {(line["benchmark"], line["method"]) for line in found["honesty"]} == {
        ("seen", m) for m in ("base", "sft", "real")
    }
    assert found["averaged"]["differences"][0]["method"] == "real, n = 2" and found["raters"]["new"]["raters"] == 2
    assert [p["runs"] for p in found["cost"][-1]["reach"]] == [1, 0]
    # The same without the rows whose text was trained on.
    again = found["repeated"]["seen"]
    assert found["repeated"]["new"] == 0 and 0 <= again < 20 and found["primary_other_texts"][0]["rows"] == 29 - again
    assert {r["n"] for r in found["other_texts"] if r["benchmark"] == "seen"} == {20 - again}
    assert found["primary"][0]["pearson"]["p"] is None  # one seed
    assert (table / "comparison.png").is_file() and (table / "comparison.csv").is_file()
    pages = experiment_tables.tables(table)
    assert "| `real` | 1 | 2 | 4 |" in pages["experiment-runs"] and pages["experiment-reduced"] == "- Everything."
    empty = {name.rpartition("-")[2] for name, text in pages.items() if text == experiment_tables.NOT_YET}
    assert empty == {"search", "timing", "noise", "bigger"}

    # Another machine has the files of finished runs and no weights: it makes what is missing, and its start once more.
    other, shared = tmp_path / "other", tmp_path / "shared"
    shutil.copytree(table, shared)
    (shared / "runs" / "real-0.json.gz").unlink()
    again = [*argv[:4], "--output", str(other), "--results", str(shared)]
    assert run.main(again) == 0
    assert "sft-0 is trained again: its weights are not here" in capsys.readouterr().out
    assert {p.name for p in (other / "runs").iterdir()} == {"sft-0", "real-0"}
    assert not (other / "runs" / "sft-0" / "test").exists()  # it is graded already
    assert kept(shared, "real-0")["test"] == real["test"]  # in fp32 on the same machine
    # Nothing is left to do; runs of other settings or rows do not mix with these.
    monkeypatch.setattr(launch.Processes, "run", lambda *_: pytest.fail("a finished run was made again"))
    assert run.main(again) == 0 and run.main([*argv, "--results-only"]) == 0
    assert json.loads((table / "summary.json").read_text()) == found
    capsys.readouterr()
    methods = {**TINY["methods"], "sft": {**TINY["methods"]["sft"], "optim": {"lr": 1e-4}}}
    written(config, common=common, seeds=[0], methods=methods)
    assert run.main([*again[:4], "--output", str(tmp_path / "third"), *again[6:]]) == 2
    assert (
        "sft-0.json.gz was made with other settings (sft.optim.lr was 0.001 and is 0.0001)" in capsys.readouterr().err
    )
    assert run.main(argv) == 2 and "was made with other settings" in capsys.readouterr().err
    data = {**TINY["data"], "averaged_rows": 5}
    written(config, common=common, seeds=[0], data=data)
    assert run.main([*again[:4], "--output", str(tmp_path / "fourth"), *again[6:]]) == 2
    assert "was made with other rows" in capsys.readouterr().err


def test_graded_rows_whose_text_was_trained_on(tmp_path: Path) -> None:
    experiment = load(written(tmp_path / "e.yaml"), tmp_path)
    graded = {b: [{"id": f"{b}{i}", "response": t} for i, t in enumerate(("No answer.", "A cat sat"))] for b in "ab"}
    experiment.primary.benchmarks = ["a", "b"]
    near, other = experiment.data.sources["seen"], experiment.data.sources["new"]
    experiment.data.sources = {"a": near, "b": other}
    write_jsonl(tmp_path / "train-a.jsonl", [{"response": "no answer"}, {"response": "Dogs ran on"}])
    assert results.repeated(experiment, tmp_path, graded) == {"a": {"a0"}, "b": set()}
    e = results.evaluation(
        "m", "a", [{**r, "prompt_id": r["id"], "score": 1} for r in graded["a"]], {"a0": 1.0, "a1": 2.0}
    )
    assert [row["id"] for row in results.without(e, {"a0"}).rows] == ["a1"]
    assert set(baselines.predictions(rows(), rows())) == set(WITHOUT_MODEL)


def test_the_search_grades_no_held_out_row(
    tmp_path: Path, tiny_judge: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_files(tmp_path / "files")
    config = written(tmp_path / "e.yaml", common={**TINY["common"], "model": str(tiny_judge)})
    output, table = tmp_path / "out", tmp_path / "table"
    monkeypatch.setattr(launch, "ThreadPoolExecutor", InThisThread)
    commands = []

    def work(_self: Any, command: list[str], said: Any) -> tuple[int, float]:
        commands.append(command[2])
        return in_this_process(_self, command, said)

    monkeypatch.setattr(launch.Processes, "run", work)
    argv = ["--config", str(config), "--data", str(files), "--output", str(output), "--results", str(table)]
    assert search.main([*argv, "--methods", "sft"]) == 2 and "has no rates for it" in capsys.readouterr().err
    assert search.main(argv) == 0
    assert commands == ["real_fast.train"] * 3  # the start, and two rates
    found = json.loads((table / "search.json").read_text())["real"]
    assert [line["lr"] for line in found] == [1e-6, 1e-5] and {line["updates"] for line in found} == {1}
    assert all(line["benchmarks"]["seen"]["rmse"] == line["rmse"] > 0 for line in found)
    best = min(found, key=lambda line: line["rmse"])["lr"]
    assert search.best(found) == best and f"best {best:g}, and the YAML file has" in capsys.readouterr().out
    assert f"**{best:g}: " in experiment_tables.rates({"real": found}, None)
    # The start is the experiment's own run, which is not made again; trials leave no weights.
    assert search.main(argv) == 0 and len(commands) == 3
    assert (output / "runs" / "sft-0" / "final").is_dir() and not (
        output / "runs" / "real_lr1e-06-0" / "final"
    ).exists()


def test_what_an_hour_buys(tmp_path: Path, tiny_judge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_files(tmp_path / "files")
    config = written(tmp_path / "e.yaml", common={**TINY["common"], "model": str(tiny_judge)})
    monkeypatch.setattr(launch.Processes, "run", in_this_process)
    argv = ["--config", str(config), "--data", str(files), "--output", str(tmp_path / "o"), "--results"]
    assert timing.main([*argv, str(tmp_path / "t"), "--methods", "base", "real"]) == 0
    base, real = json.loads((tmp_path / "t" / "timing.json").read_text())
    assert base["update"] == 0 and base["runs"] == 1 and base["rows"] > 29
    assert real["update"] > 0 and real["row"] > 0 and real["runs"] == 2
    assert real["all"] == pytest.approx(2 * real["run"] + 2 * 3 * 12 * real["row"])
    assert "| `real` |" in experiment_tables.timing_table([base, real])


def test_the_halves_of_the_gradient(
    tmp_path: Path, tiny_judge: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_files(tmp_path / "files")
    config = written(tmp_path / "e.yaml", common={**TINY["common"], "model": str(tiny_judge)})
    monkeypatch.setattr(launch, "ThreadPoolExecutor", InThisThread)
    monkeypatch.setattr(launch.Processes, "run", in_this_process)
    seen: list[dict[str, torch.Tensor]] = []
    measure = noise.gradients

    def with_the_whole(parts: Any, methods: dict[str, Any], batches: int) -> dict[str, torch.Tensor]:
        seen.append(measure(parts, {**methods, "whole": parts.method}, batches))
        return {name: seen[-1][name] for name in methods}

    monkeypatch.setattr(noise, "gradients", with_the_whole)
    argv = ["--config", str(config), "--data", str(files), "--output", str(tmp_path / "o"), "--results"]
    argv += [str(tmp_path / "t"), "--batches"]
    assert noise.main([*argv, "2"]) == 2 and "with 3 or more" in capsys.readouterr().err
    assert noise.main([*argv, "3", "--methods", "real", "sft"]) == 0
    found = json.loads((tmp_path / "t" / "noise.json").read_text())
    assert [line["part"] for line in found["real"]] == ["exploration", "refinement", "both"]
    assert [line["part"] for line in found["sft"]] == ["all"] and found["sft"][0]["prompts"] == 2
    explored, refined, whole = (seen[0][name] for name in ("exploration", "refinement", "whole"))
    torch.testing.assert_close(explored + refined, whole)
    # Other batches, and the weights stay: both halves of both are something.
    assert explored.shape[0] == 3 and (whole[0] - whole[1]).abs().max() > 0
    assert all(line["norm"] > 0 and line["low"] <= line["signal"] <= line["high"] for line in found["real"])
    assert "real, exploration: the signal's share" in capsys.readouterr().out
    assert "| `real` | exploration | 2 |" in experiment_tables.noise_table(found)
    assert {p.name for p in (tmp_path / "o" / "runs").iterdir()} == {"sft-0"}  # where real starts
    assert not (tmp_path / "o" / "noise").exists()


def test_what_is_left_to_do(tmp_path: Path) -> None:
    experiment = load(written(tmp_path / "e.yaml"), tmp_path)
    left = partial(launch.needed, experiment, tmp_path, tmp_path / "results")
    everything = [("base", 0), ("sft", 0), ("real", 0), ("sft", 1), ("real", 1)]
    assert left(None) == everything and left(["sft"]) == [("sft", 0), ("sft", 1)]
    for method, seed in everything[:3]:
        file = record.file_of(tmp_path / "results", method, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert left(None) == everything[3:] == left(["real"])
    record.file_of(tmp_path / "results", "sft", 1).touch()
    assert left(None) == everything[3:]  # the start's weights are not here
    run_folder(tmp_path, "sft", 1).mkdir(parents=True)
    write_json(run_folder(tmp_path, "sft", 1) / "summary.json", {})
    assert left(None) == [("real", 1)]


def test_its_own_template_goes_with_the_runs(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ response }} one")
    common = {**TINY["common"], "prompt": {"template": "own.jinja", "max_tokens": 99}}
    output = tmp_path / "out"
    experiment: Experiment = load(written(tmp_path / "e.yaml", common=common), output)
    output.mkdir()
    run.require_same(experiment, output)
    prompt = experiment.config("sft", 0, output)["prompt"]
    assert prompt["max_tokens"] == 99 and Path(prompt["template"]).read_text() == "{{ response }} one"
    before = record.settings_of(experiment, "sft", 0)
    (tmp_path / "own.jinja").write_text("{{ response }} two")
    assert record.settings_of(experiment, "sft", 0) != before
    with pytest.raises(OSError, match="another prompt template"):
        run.require_same(experiment, output)


def test_a_variable_names_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = written(tmp_path / "e.yaml", common={**TINY["common"], "model": "$A_MODEL"})
    monkeypatch.delenv("A_MODEL", raising=False)
    with pytest.raises(ValueError, match=r"common\.model is \$A_MODEL: set that variable"):
        load(config, tmp_path)
    monkeypatch.setenv("A_MODEL", "/models/a")
    experiment = load(config, tmp_path)
    assert experiment.config("sft", 0, tmp_path)["model"] == "/models/a"
    assert record.settings_of(experiment, "sft", 0)["runs"]["sft"]["model"] == "$A_MODEL"  # the same everywhere
