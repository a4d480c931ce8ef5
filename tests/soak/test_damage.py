"""The soak's disk and damage can lose: by trials in which nothing failed, and by words that are missing."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from tests.soak import damage
from tests.soak.disk_trials import Sweep
from tests.soak.tiny_runs import Ended


def test_a_trial_in_which_nothing_failed_is_none():
    def outcomes(*fired, problem=None):
        sweep, left = Sweep.__new__(Sweep), list(fired)
        sweep.case, sweep.disk = "real", SimpleNamespace(fired_at=-1)

        def trial(number, fault):
            sweep.disk.fired_at = left.pop(0)
            return "kind", problem

        sweep.trial = trial
        return list(sweep.trials([(0, "full")] * len(fired)))

    assert outcomes(-1, 3, -1) == [("kind", None)]
    assert outcomes(-1, 3, problem="worse") == [("kind", "worse")] * 2
    ((kind, problem),) = outcomes(-1, -1)
    assert kind == "real: no operation was left to fail" and "of 2 trials none" in problem


TOLD = "warning: going on from step-000001, since what is newer is damaged (step-000002: config.json is missing)"


@pytest.mark.parametrize(
    ("said", "status", "newest", "other", "problem"),
    [
        (f"{TOLD}\nloading step-000001\n", 0, True, None, None),
        ("loading step-000002\n", 0, True, None, "goes on, without saying"),
        ("warning: config.json is missing\nloading step-000002\n", 0, True, None, "goes on, without saying"),
        (TOLD.replace("config", "model") + "\nloading step-000001\n", 0, True, None, "goes on, without saying"),
        (f"\nloading step-000001\n{TOLD}", 0, True, None, "says so when it has begun"),
        (f"{TOLD}\nloading step-000001\n", 0, True, "final differs", "goes on, and final differs"),
        ("loading step-000002\n", 0, True, "final differs", "without saying that .* final differs"),
        ("error: config.json is missing", 2, True, None, "stops: "),
        ("error: config.json is missing", 2, False, None, None),
        ("error: something is missing", 2, False, None, "stops, and does not name the file"),
        ("loading step-000002\n", 0, False, None, None),
        ("loading step-000002\n", 0, False, "final differs", "goes on without a word, and final differs"),
        ("Traceback (most recent call last)", 0, True, None, "Traceback"),
        ("", None, True, None, "status None"),
    ],
)
def test_what_a_damaged_run_does_is_judged(tmp_path, monkeypatch, said, status, newest, other, problem):
    cut_off = damage.CutOff.__new__(damage.CutOff)
    cut_off.output, cut_off.want = tmp_path, {}
    monkeypatch.setattr(damage, "outcome", lambda _: {})
    monkeypatch.setattr(damage, "difference", lambda *_: other)
    done = damage.Damage("it", "removed", ["checkpoints/step-000002/config.json"], stops=not newest, newest=newest)
    found = cut_off._judged(done, Ended(status, said), damage._listing(tmp_path))
    assert found is None if problem is None else re.search(problem, found)
    if status == 2:
        assert cut_off._judged(done, Ended(status, "error: config.json"), ["more"]) == "stops, and has touched the run"
