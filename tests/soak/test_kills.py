"""A few of the soak's kills, and that what a kill could lose would be found."""

from __future__ import annotations

import json
import multiprocessing
import shutil

import pytest

from real_fast.runs import logged
from real_fast.runs.sealed import writing_folder
from real_fast.utils.jsonio import write_json, write_jsonl
from tests.soak import kills, launch
from tests.soak.same_run import differences


def test_killed_runs_end_as_the_one_that_nobody_disturbed(tmp_path):
    found = kills.run(tmp_path, 0.11)
    assert not found.lost
    assert sum(fault.injected for fault in found.faults) >= 3
    assert {fault.kind.rpartition(", ")[2] for fault in found.faults} == {"one process", "2 ranks"}


def metrics(seconds):
    return [{"step": n, "loss": 0.5 / n, "time/update": seconds} for n in (1, 2)]


@pytest.fixture
def two(tmp_path):
    """Two runs that are the same but for times and for where they lie."""
    for name, seconds in (("a", 1.0), ("b", 2.0)):
        run = tmp_path / name
        for step in (1, 2):
            with writing_folder(run / "checkpoints" / f"step-{step:06d}") as folder:
                (folder / "model.safetensors").write_bytes(b"weights")
                write_json(folder / "trainer_state.json", {"step": step, "seconds": {"load": seconds}})
                write_jsonl(run / "metrics.jsonl", metrics(seconds)[:step])
                (folder / "logged.json").write_text(logged.text_of(run, ["metrics.jsonl"]))
        with writing_folder(run / "final") as folder:
            (folder / "model.safetensors").write_bytes(b"weights")
        write_jsonl(run / "rollouts.jsonl", [{"id": "row 1", "output": "Fine."}])
        (run / "config.yaml").write_text(f"output: {run}\nresume: {name == 'b'}\noptim: {{lr: 0.1}}\n")
        (run / "report.html").write_text(f"<p>{seconds}</p></html>\n")
        (run / "training.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes([int(seconds)]))
        write_json(run / "trackers.json", {"id": f"ab{seconds}", "sent": {"trackio": 2}})
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
        (lambda run: change(run / "rollouts.jsonl", "row 1", "row 2"), "rollouts.jsonl differs (line 1: id)"),
        (lambda run: change(run / "rollouts.jsonl", "Fine", "Bad"), "rollouts.jsonl differs (line 1: output)"),
        (lambda run: change(run / "metrics.jsonl", "2.0", "3.0"), "step-000002: metrics.jsonl is not as logged.json"),
        (lambda run: change(run / "config.yaml", "0.1", "0.2"), "config.yaml differs (line 1: optim)"),
        (lambda run: (run / "config.yaml").write_text("optim: {"), "config.yaml differs"),
        (lambda run: (run / "report.html").write_text(""), "report.html differs"),
        (lambda run: (run / "training.png").unlink(), "training.png is missing"),
        (lambda run: (run / "training.png").write_bytes(b""), "training.png differs"),
        (lambda run: change(run / "trackers.json", "2", "3"), "trackers.json differs (line 1: sent)"),
        (lambda run: (run / "checkpoints" / "step-000002.damaged").mkdir(), "step-000002.damaged is too much"),
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


def case(problem, killed=(), during=()):
    made = kills.Case("sft", 1, (KILL, KILL), "sft, 1, load"), kills.Outcome([*killed], [*during], problem, [])
    return {fault.kind: fault for fault in kills.found([made[0]], [made[1]], []).faults}


KILL = kills.Kill("update", 1)


def test_a_run_that_fails_before_its_kill_is_lost():
    assert case("it had not ended after 90 s")["before the kill, one process"].lost == ["it had not ended after 90 s"]
    assert case(None) == {}
    assert set(case("worse", [KILL, KILL], ["update", "load"])) == {"update, one process", "resume, one process"}


def test_a_kill_counts_under_what_it_hit():
    def hit(*sent):
        receive, send = multiprocessing.Pipe(duplex=False)
        for message in sent:
            send.send(message)
        send.close()
        return launch._hit(receive, "update", ["load", "update"])

    assert hit() == "update" == hit(("checkpoint", True))
    assert hit(("update", False), ("checkpoint", True)) == "checkpoint"
    assert hit(("update", False), ("load", False), ("changes", 9)) == launch.BETWEEN
    faults = case(None, [KILL], ["checkpoint"])
    assert list(faults) == ["checkpoint, one process"]


@pytest.mark.parametrize(
    ("statuses", "said", "passes"),
    [
        ([2, 2], "nothing is left to resume", True),
        ([1, 1], "nothing is left to resume", False),
        ([2, 2], "Traceback", False),
        ([2, 1], "nothing is left to resume", False),
    ],
)
def test_a_finished_runs_resume_may_end_in_one_way_alone(tmp_path, statuses, said, passes):
    log = tmp_path / "log"
    log.write_text("nothing is left to resume\n" + said)
    ended = kills.Ended(statuses)
    assert not kills.had_ended(tmp_path, ended, log, 26)
    (tmp_path / "summary.json").touch()
    assert kills.had_ended(tmp_path, ended, log, 26) is passes
