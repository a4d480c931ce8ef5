"""A few of the soak's kills, and that what a kill could lose would be found."""

from __future__ import annotations

import json
import shutil

import pytest

from real_fast.runs.sealed import writing_folder
from real_fast.utils.jsonio import write_json, write_jsonl
from tests.soak import kills
from tests.soak.same_run import differences


def test_killed_runs_end_as_the_one_that_nobody_disturbed(tmp_path):
    found = kills.run(tmp_path, 0.11)
    assert not found.lost
    assert sum(fault.injected for fault in found.faults) >= 3
    assert {fault.kind.rpartition(", ")[2] for fault in found.faults} == {"one process", "2 ranks"}


@pytest.fixture
def two(tmp_path):
    """Two runs that are the same but for times and for where they lie."""
    for name, seconds in (("a", 1.0), ("b", 2.0)):
        run = tmp_path / name
        for step in (1, 2):
            with writing_folder(run / "checkpoints" / f"step-{step:06d}") as folder:
                (folder / "model.safetensors").write_bytes(b"weights")
                write_json(folder / "trainer_state.json", {"step": step, "seconds": {"load": seconds}})
        with writing_folder(run / "final") as folder:
            (folder / "model.safetensors").write_bytes(b"weights")
        write_jsonl(run / "metrics.jsonl", [{"step": n, "loss": 0.5 / n, "time/update": seconds} for n in (1, 2)])
        write_json(run / "summary.json", {"data": f"{run}/rows.jsonl", "seconds": seconds})
    return tmp_path / "a", tmp_path / "b"


def change(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda run: change(run / "metrics.jsonl", "0.25", "0.26"), "metrics.jsonl differs (line 2: loss)"),
        (lambda run: (run / "metrics.jsonl").write_text("", encoding="utf-8"), "metrics.jsonl differs (0 lines in"),
        (lambda run: change(run / "summary.json", "rows", "others"), "summary.json differs (line 1: data)"),
        (lambda run: (run / "eval").mkdir() or (run / "eval" / ".a.json.7.tmp").touch(), "eval/.a.json.7.tmp is too"),
        (lambda run: shutil.rmtree(run / "checkpoints" / "step-000001"), "step-000001/checksums.json is missing"),
        (lambda run: (run / "final" / "model.safetensors").write_bytes(b"heights"), "model.safetensors differs"),
        (lambda run: change(run / "final" / "checksums.json", '": "', '": "0'), "final: model.safetensors is not as"),
    ],
)
def test_what_a_run_lost_is_found(two, harm, said):
    assert differences(*two) == []
    harm(two[1])
    assert any(said in line for line in differences(*two)), differences(*two)


def test_the_plan_has_every_phase_of_a_run_and_is_the_same_every_time():
    known = kills.Ended([0], phases=[("load", 0.5), ("update", 0.2), ("update", 0.1)], changes=50)
    plan = list(kills.plan("real", 2, known))
    assert plan == list(kills.plan("real", 2, known))
    assert [case.kills[0].phase for case in plan] == ["load", "update", "", "", ""]
    assert all(kill.after < 0.5 and kill.at <= 50 for case in plan for kill in case.kills)
    assert json.dumps([str(kill) for case in plan for kill in case.kills])
