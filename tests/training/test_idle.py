"""A run that trains nothing says so, stops, keeps a checkpoint and ends with an error."""

from __future__ import annotations

import pytest

from real_fast.errors import NothingTrainedError
from real_fast.train import Trainer, main
from real_fast.training.idle import Idle
from real_fast.utils.jsonio import read_jsonl
from tests.golden.trajectories import run_flags

GENERATED = ("--rollout.answer", "generated", "--warmup.steps", "0", "--train.steps", "6", "--rollout.max_tokens", "4")


def update(idle, scored, *stepped):
    idle.begin(scored)
    for one in stepped:
        idle.step(one)
    return idle.end()


def test_updates_in_a_row_are_counted():
    idle = Idle(limit=2)
    assert update(idle, True, False) is None  # the gradient was not finite
    assert update(idle, True, False, True) is None  # one of its two steps was taken
    assert update(idle, False, True) is None  # no rollout had a score
    assert isinstance(update(idle, True, False), NothingTrainedError)
    never = Idle(limit=0)
    assert all(update(never, False, True) is None for _ in range(50))


@pytest.mark.e2e
def test_no_score_in_any_rollout_ends_the_run_with_a_checkpoint(golden_model, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(run_flags(golden_model, output, *GENERATED, "--train.give_up_after", "3")) == 2
    error = capsys.readouterr().err
    assert "warning: an update trained nothing, since no rollout had a score" in error
    assert "error: 3 updates in a row trained nothing" in error and "rollout.answer to forced" in error
    assert "step-000003 is kept: go on with --resume" in error
    assert (output / "checkpoints" / "step-000003").is_dir() and not (output / "final").exists()
    assert len([m for m in read_jsonl(output / "metrics.jsonl") if m["phase"] == "real"]) == 3


@pytest.mark.e2e
@pytest.mark.parametrize("phase", ["warmup", "real"])
def test_gradients_that_are_not_finite_end_the_run(golden_model, tmp_path, monkeypatch, capsys, phase):
    from real_fast.training import update, warmup

    monkeypatch.setattr(warmup if phase == "warmup" else update, "clip_and_step", lambda *_: (float("nan"), False))
    more = ("--train.give_up_after", "2", "--warmup.steps", "2")
    assert main(run_flags(golden_model, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert "2 updates in a row trained nothing" in error and "lower optim.lr" in error
    assert ("no checkpoint yet: --resume starts over" if phase == "warmup" else "step-000002 is kept") in error


@pytest.mark.e2e
def test_an_error_says_truly_what_is_kept(golden_model, tmp_path, monkeypatch, capsys):
    def fails(self):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Trainer, "step", fails)
    with pytest.raises(RuntimeError):
        main(run_flags(golden_model, tmp_path / "run", "--warmup.steps", "0"))
    assert "step-000000 is kept: go on with --resume" in capsys.readouterr().err
