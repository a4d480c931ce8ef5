"""The experiment: settings of its runs, its split, going on where it stopped, and its results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import data, launch, longer, results, run
from experiments.settings import Data, Experiment, load, run_folder
from real_fast import train
from real_fast.config import Config, PromptConfig, cli
from real_fast.data import synthetic
from real_fast.data.dataset import load_rows
from real_fast.errors import ConfigError, DataError
from real_fast.methods.registry import METHODS
from real_fast.prompt.builder import PromptBuilder
from real_fast.score.scale import ScoreScale
from real_fast.utils.jsonio import read_jsonl, write_json, write_jsonl
from tools import experiment_tables

ROOT = Path(__file__).resolve().parents[2]
TINY: dict[str, Any] = {
    "seeds": [0, 1],
    "data": {"train": ["seen.jsonl"], "unseen": ["new.jsonl"], "test_share": 0.3, "max_unseen": 9},
    "reduced": ["Everything."],
    "baseline": "sft",
    "common": {
        "prompt": {"template": "short", "system": ""},
        "rollout": {"engine": "transformers", "prompts_per_step": 2, "group_size": 2, "max_tokens": 12},
        "supervised": {"prompts_per_step": 2},
        "train": {"steps": 1, "precision": "fp32"},
        "eval": {"on_start": False, "temperature": 0.0, "bootstrap": 20},
        "save": {"every": 0},
    },
    "methods": {
        "base": {"train": {"steps": 0}},
        "sft": {"method": "sft", "optim": {"lr": 1e-3}},
        "real": {"init_from": "sft"},
    },
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    rows = list(synthetic.generate(*synthetic.SIZES["eval"], seed=0, which="eval"))[:80]
    for name, some in {"seen": rows[:60], "new": rows[60:]}.items():
        write_jsonl(folder / f"{name}.jsonl", [{**row, "id": f"{name}-{i}"} for i, row in enumerate(some)])
    return folder


def written(path: Path, **change: Any) -> Path:
    path.write_text(yaml.safe_dump({**TINY, **change}, sort_keys=False), encoding="utf-8")
    return path


# Settings


@pytest.mark.parametrize("name", ["cpu.yaml", "gpu.yaml"])
def test_the_committed_experiments(name: str, tmp_path: Path) -> None:
    experiment = load(ROOT / "experiments" / name, tmp_path)
    assert len(experiment.seeds) >= 3
    methods = {m: cli.from_namespace(Config, experiment.config(m, 1, tmp_path)) for m in experiment.methods}
    assert {config.method for config in methods.values()} == {"sft", "raft", "tract", "binary_rl", "real"}
    assert methods["base"].train.steps == 0 and methods["real_reference"].objective.reward == "authors"
    assert (
        methods["real_no_refinement"].objective.beta == 0 and not methods["real_no_exploration"].objective.exploration
    )
    for name, config in methods.items():
        assert config.seed == 1 and config.output == str(tmp_path / "runs" / f"{name}-1")
        sampling = config.train.steps > 0 and METHODS[config.method].uses_rollouts
        start = name.removesuffix("_longer") if name.endswith("_longer") else "sft" if sampling else None
        assert config.init_from == (start and str(tmp_path / "runs" / f"{start}-1"))
        assert (config.rollout, config.data, config.prompt) == (
            methods["real"].rollout, methods["real"].data, methods["real"].prompt
        )  # fmt: skip
    # Methods that sample differ by the objective alone.
    assert methods["binary_rl"].optim == methods["real"].optim and methods["binary_rl"].train == methods["real"].train
    assert [seed for m, seed in experiment.order() if m == "base"] == [0]
    assert [seed for m, seed in experiment.order() if m == "sft"] == experiment.seeds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": [0]}, "seed"),
        ({"data": {"train": []}}, "unseen"),
        ({"methods": {"real": {"init_from": "sft"}, "sft": {"method": "sft"}}}, "real starts from sft"),
        ({"methods": {"sft": {"method": "best"}}}, "(?s)sft: .*best"),
        ({"methods": {"sft": {"optim": {"lr": -1.0}}}}, "sft: optim.lr is -1.0"),
        ({"seeds": [1, 1]}, "each once"),
        ({"baseline": "best"}, "baseline best is not among"),
        ({"data": {"train": ["a"], "unseen": [], "rubric": "Question"}}, "data.rubric is 'Question'"),
        ({"common": None}, "none under common"),
        (
            {"methods": {"sft": {"train": {"steps": 0}}, "real": {"init_from": "sft"}}, "seeds": [0, 1]},
            "real starts from sft, which is not trained",
        ),
    ],
)
def test_mistakes_are_said_before_the_work(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    change = {"common": {**TINY["common"], "model": "m"}} | change
    with pytest.raises(ConfigError, match=message):
        load(written(tmp_path / "e.yaml", **change), tmp_path)


# Rows


def test_what_is_shortened() -> None:
    row = {
        "rubric": "[Is it clear?]\nScore 1: no.\nScore 5: yes.",
        "reference_answer": "r",
        "feedbacks": ['It is e.g. clear (mostly). However, it ends early! "Why?" asks nobody.', "Short"],
    }
    short = data.shortened(row, Data([], [], reference_answer=False, rubric="question", sentences=2))
    assert short == {
        "rubric": "Is it clear?",
        "feedbacks": ["It is e.g. clear (mostly). However, it ends early!", "Short"],
    }
    assert data.shortened(row, Data([], [])) == row and "reference_answer" in row


def test_the_split_holds_out_whole_prompts(files: Path, tmp_path: Path, smollm2_tokenizer: Any) -> None:
    scale = ScoreScale.from_tokenizer(smollm2_tokenizer, [1, 2, 3, 4, 5], "So the overall score is ")
    builder = PromptBuilder(PromptConfig(template="short", system=""), smollm2_tokenizer, scale)
    rows = load_rows(str(files / "seen.jsonl"), "", builder, scale, 400, [])
    lengths = sorted(len(row.prompt_ids) for row in rows)
    prompt = PromptConfig(template="short", system="", max_tokens=lengths[40])
    given = Data(["seen.jsonl"], ["new.jsonl"], test_share=0.3, max_unseen=9)
    split = json.loads(data.prepare(given, files, tmp_path / "a", prompt, builder, scale).read_text())
    train, test = (read_jsonl(tmp_path / "a" / f"{name}.jsonl") for name in ("train", "test"))
    assert not {row["prompt_id"] for row in train} & {row["prompt_id"] for row in test}
    assert all(row["id"].startswith("seen") for row in train)
    assert [row["id"] for row in test] == split["benchmarks"]["seen"] + split["benchmarks"]["new"]
    assert 0 < len(split["benchmarks"]["new"]) <= 9
    counts = split["counts"]["seen"]
    (left_out,) = counts["left_out"].items()
    assert counts["rows"] == 60 == counts["train"] + counts["test"] + left_out[1]
    assert left_out[0] == "prompt is too long" and left_out[1] > 0
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"train.jsonl", "test.jsonl", "split.json"}
    # Fewer rows that fit hold out the same prompts, as far as they are there.
    longer = PromptConfig(template="short", system="", max_tokens=400)
    again = json.loads(data.prepare(given, files, tmp_path / "b", longer, builder, scale).read_text())
    assert set(split["benchmarks"]["seen"]) < set(again["benchmarks"]["seen"])
    assert not set(again["benchmarks"]["seen"]) & {row["id"] for row in train}
    with pytest.raises(DataError, match=r"gone\.jsonl is missing: .*--data"):
        data.prepare(Data(["gone.jsonl"], []), files, tmp_path / "c", prompt, builder, scale)


# Running


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


def test_an_experiment_from_its_files_to_its_table(
    files: Path, tmp_path: Path, tiny_judge: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = written(tmp_path / "e.yaml", common={**TINY["common"], "model": str(tiny_judge)}, seeds=[0])
    output, table = tmp_path / "out", tmp_path / "table"
    monkeypatch.setattr(results, "_BOOTSTRAP", 50)
    argv = ["--config", str(config), "--data", str(files), "--output", str(output), "--results", str(table)]
    assert run.main([*argv, "--methods", "base"]) == 0
    known = (output / "runs" / "base-0" / "summary.json").stat().st_mtime_ns
    assert "not finished, and not in the table: sft-0, real-0" in capsys.readouterr().out
    # One run has shown how they are started; the others save the seconds that a process takes to import.
    monkeypatch.setattr(launch, "ThreadPoolExecutor", InThisThread)
    monkeypatch.setattr(launch.Processes, "run", lambda _self, command, _said: train.main(command[3:]))
    assert run.main([*argv, "--methods", "real"]) == 0  # and sft, which it starts from
    assert (output / "runs" / "base-0" / "summary.json").stat().st_mtime_ns == known
    runs = {p.name for p in (output / "runs").iterdir()}
    assert runs == {"base-0", "sft-0", "real-0"}
    assert not list(output.rglob("checkpoints")) and (output / "runs" / "sft-0" / "final").is_dir()
    started = yaml.safe_load((output / "runs" / "real-0" / "config.yaml").read_text())["init_from"]
    assert started == str(output / "runs" / "sft-0")
    found = json.loads((table / "summary.json").read_text())
    assert {(r["method"], r["benchmark"]) for r in found["results"]} == {
        (m, b) for m in ("base", "sft", "real") for b in ("in_domain", "seen", "new")
    }
    assert all({"seed", "pearson", "spearman", "kendall", "rmse", "n"} <= r.keys() for r in found["results"])
    assert found["missing"] == [] and found["reduced"] == ["Everything."] and found["runs"]["sft-0"]["rows_seen"] == 2
    assert [m["method"] for m in found["by_label"]] == ["base", "sft", "real"]
    assert sum(p["n"] for p in found["by_label"][0]["parts"]) == found["results"][0]["n"]
    (gain,) = found["over_starts"]
    values = {r["method"]: r["rmse"] for r in found["results"] if r["benchmark"] == "in_domain"}
    assert (gain["method"], gain["start"]) == ("real", "sft") and gain["rmse"]["low"] is not None
    assert gain["rmse"]["value"] == pytest.approx(values["real"] - values["sft"])
    kept = json.loads((table / "predictions.json").read_text())
    assert kept.keys() == {"base-0", "sft-0", "real-0"}
    ids = {row["id"] for row in read_jsonl(output / "data" / "test.jsonl")}
    assert all(rows.keys() == ids and None not in rows.values() for rows in kept.values())
    printed = capsys.readouterr().out
    assert "| in_domain | real |" in printed and "| seen |" not in printed and "from `sft`" in printed
    assert (table / "comparison.png").is_file() and (table / "comparison.csv").is_file()
    assert 0 <= found["runs"]["real-0"]["zero_spread"] <= 1 and found["runs"]["real-0"]["kl"] >= 0
    pages = experiment_tables.tables(table)
    assert "| `real` | 1 |" in pages["experiment"] and "| `real` | 1 | 2 |" in pages["runs"]
    assert pages["reduced"] == "- Everything."
    # Without the runs: what is finished, in the runs' own folder.
    assert run.main([*argv[:-2], "--results-only"]) == 0
    assert json.loads((output / "results" / "summary.json").read_text()) == found
    # The longer rows of the same held-out prompts; what is graded stays.
    argv_longer = [*argv[:-1], str(tmp_path / "longer"), "--max-tokens", "300", "--methods", "sft", "real"]
    assert longer.main(argv_longer) == 0
    assert "| in_domain_longer | real |" in (tmp_path / "longer" / "comparison.md").read_text()
    graded = {row["id"] for row in read_jsonl(output / "runs" / "real-0" / "data-300" / "predictions.jsonl")}
    assert graded == {i for i in ids if i.startswith("seen")}  # none of these is longer
    monkeypatch.setattr(longer.evaluate, "main", lambda _: pytest.fail("graded again"))
    assert longer.main(argv_longer) == 0
    monkeypatch.setattr(longer.evaluate, "main", lambda _: 2)
    capsys.readouterr()
    assert longer.main([*argv_longer[:-2], "base"]) == 1 and "base-0 was not graded" in capsys.readouterr().err
    assert longer.main([*argv_longer[:-2], "sfd"]) == 2 and "--methods sfd: " in capsys.readouterr().err
    # Nothing is left to do; another method may join, and other settings are not mixed with these.
    monkeypatch.setattr(launch, "run_one", lambda *_: pytest.fail("a finished run was made again"))
    assert run.main(argv) == 0
    methods = {**TINY["methods"], "more": {"method": "sft"}}
    common = {**TINY["common"], "model": str(tiny_judge)}
    written(config, common=common, seeds=[0], methods=methods)
    monkeypatch.setattr(launch, "run_one", lambda _e, folder, *_: (7, folder / "logs" / "more-0.log"))
    capsys.readouterr()
    assert run.main(argv) == 1
    out, err = capsys.readouterr()
    assert "more-0 failed with status 7: see " in err and "| in_domain | real |" in out
    written(config, common={**common, "optim": {"lr": 1.0}}, seeds=[0])
    assert run.main(argv) == 2 and "was made with other settings" in capsys.readouterr().err


def test_its_own_template_goes_with_the_runs(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ response }} one")
    common = {**TINY["common"], "model": "m", "prompt": {"template": "own.jinja", "max_tokens": 99}}
    output = tmp_path / "out"
    experiment = load(written(tmp_path / "e.yaml", common=common), output)
    output.mkdir()
    run.require_same(experiment, output)
    prompt = experiment.config("sft", 0, output)["prompt"]
    assert prompt["max_tokens"] == 99 and Path(prompt["template"]).read_text() == "{{ response }} one"
    (tmp_path / "own.jinja").write_text("{{ response }} two")
    with pytest.raises(OSError, match="another prompt template"):
        run.require_same(experiment, output)


def test_a_run_that_fails_takes_its_followers_along_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def one(_experiment: Any, folder: Path, method: str, seed: int, _processes: Any) -> tuple[int, Path]:
        tried.append(f"{method}-{seed}")
        return (3 if tried[-1] == "sft-0" else 0), folder / "log"

    monkeypatch.setattr(launch, "run_one", one)
    experiment = Experiment([0, 1], Data([], []), TINY["common"], TINY["methods"])
    failed: list[str] = []
    launch.run_all(experiment, tmp_path, None, failed)
    assert failed == [
        f"sft-0 failed with status 3: see {tmp_path / 'log'}", "real-0 was left out: it starts from sft-0",
    ]  # fmt: skip
    assert tried == ["base-0", "sft-0", "sft-1", "real-1"]


def test_two_do_not_run_in_one_folder(tmp_path: Path) -> None:
    """Neither another command, nor one after the first was killed whose run goes on."""
    with run.alone_in(tmp_path):
        with pytest.raises(OSError, match="is in use"), run.alone_in(tmp_path):
            pass
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    with pytest.raises(OSError, match="is in use"), run.alone_in(tmp_path):
        pass
    child.communicate(b"\n")
    with run.alone_in(tmp_path):
        pass


@pytest.mark.parametrize("jobs", [1, 2, 6])
def test_several_at_a_time_each_behind_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    methods = {"sft": {"method": "sft"}, "real": {"init_from": "sft"}, "other": {"method": "sft"}}
    experiment = Experiment([0, 1], Data([], []), TINY["common"], methods)
    events: list[tuple[int, str]] = []
    full = threading.Event()

    def most_at_once() -> int:
        return max(accumulate(change for change, _ in events))

    def one(_experiment: Any, folder: Path, method: str, seed: int, _processes: Any) -> tuple[int, Path]:
        events.append((1, f"{method}-{seed}"))
        if most_at_once() == min(jobs, 4):
            full.set()
        full.wait(20)
        time.sleep(0.1)  # for more than there should be
        events.append((-1, f"{method}-{seed}"))
        return 0, folder / "log"

    monkeypatch.setattr(launch, "run_one", one)
    launch.run_all(experiment, tmp_path, None, [], jobs)
    assert len(events) == 12
    for seed in (0, 1):
        assert events.index((-1, f"sft-{seed}")) < events.index((1, f"real-{seed}"))
    # Of six runs, four can start at once.
    assert most_at_once() == min(jobs, 4)


# Says that it has started; where Ctrl-C comes, it takes a moment, as a run that finishes its step.
_STAYS = """
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.3); pathlib.Path(sys.argv[1], "checkpoint").touch(); sys.exit(130)
signal.signal(signal.SIGINT, stop)
pathlib.Path(sys.argv[1], "started").touch()
time.sleep(60)
"""


def test_ctrl_c_lets_every_run_write_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment([0, 1, 2], Data([], []), TINY["common"], {"sft": {"method": "sft"}})
    folders = [tmp_path / f"sft-{seed}" for seed in (0, 1)]

    def one(_experiment: Any, folder: Path, method: str, seed: int, processes: launch.Processes) -> tuple[int, Path]:
        mine = folder / f"{method}-{seed}"
        mine.mkdir()
        with (folder / "log").open("a") as said:
            return processes.run([sys.executable, "-c", _STAYS, str(mine)], said), folder / "log"

    def press() -> None:
        while not all((folder / "started").exists() for folder in folders):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(launch, "run_one", one)
    threading.Thread(target=press, daemon=True).start()
    with run.stopped_by(signal.SIGTERM), pytest.raises(KeyboardInterrupt):
        launch.run_all(experiment, tmp_path, None, [], jobs=2)
    assert all((folder / "checkpoint").exists() for folder in folders) and not (tmp_path / "sft-2").exists()
    # A run that is about to start when Ctrl-C comes does not.
    stopped = launch.Processes(1)
    stopped.stop([])
    with (tmp_path / "log").open("a") as said:
        assert stopped.run([sys.executable, "-c", "raise SystemExit(7)"], said) == 130


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    class Process:
        def __init__(self, command: list[str], **settings: Any) -> None:
            commands.append(command)
            assert settings["start_new_session"]

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Process)
    experiment = Experiment([0], Data([], []), TINY["common"], TINY["methods"])
    assert launch.run_one(experiment, tmp_path, "sft", 0, launch.Processes(1))[0] == 0
    (run_folder(tmp_path, "sft", 0) / "stage1" / "checkpoints").mkdir(parents=True)
    assert launch.run_one(experiment, tmp_path, "sft", 0, launch.Processes(1))[0] == 0
    assert "--resume" not in commands[0] and commands[1][-2:] == ["--resume", "true"]
    assert not (run_folder(tmp_path, "sft", 0) / "stage1" / "checkpoints").exists()


def test_results_need_a_finished_run(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_json(tmp_path / "data" / "split.json", {"benchmarks": {"seen": ["1"]}, "counts": {}})
    experiment = Experiment([0], Data(["seen.jsonl"], []), TINY["common"], TINY["methods"])
    with pytest.raises(OSError, match="no finished run yet"):
        results.write(experiment, tmp_path, tmp_path / "r")
