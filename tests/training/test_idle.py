"""A run that trains nothing says so, stops, keeps a checkpoint and ends with an error."""

from __future__ import annotations

import pytest

from real_fast.errors import NothingTrainedError
from real_fast.runs.checkpoint import TrainState
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
    state = TrainState()
    idle = Idle(2, state)
    assert update(idle, True, False) is None  # the gradient was not finite
    assert update(idle, True, False, True) is None  # one of its two steps was taken
    assert update(idle, False, True) is None  # no rollout had a score
    assert state.idle_updates == 1
    assert isinstance(update(Idle(2, state), True, False), NothingTrainedError)  # a resumed run goes on counting
    never = Idle(0, TrainState())
    assert all(update(never, False, True) is None for _ in range(50))
    never.check_run(50)


def test_a_run_of_few_updates_of_which_none_trained_anything_is_not_finished():
    state = TrainState()
    idle = Idle(10, state)
    idle.check_run(0)  # a run of no updates has nothing to train
    assert all(update(idle, False, True) is None for _ in range(6))
    with pytest.raises(NothingTrainedError, match="none of the 6 updates trained anything, since no rollout had"):
        idle.check_run(6)
    with pytest.raises(NothingTrainedError, match="since as metrics"):
        Idle(10, state).check_run(6)  # resumed at its end
    idle.check_run(106)  # the run was extended by 6, and had trained before
    assert update(idle, True, True) is None
    idle.check_run(7)


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
def test_a_short_run_that_trained_nothing_ends_with_an_error_until_told(golden_model, tmp_path, capsys):
    flags = run_flags(golden_model, tmp_path / "run", *GENERATED, "--train.steps", "2")
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert "none of the 2 updates trained anything, since no rollout had a score" in error
    assert "step-000002 is kept" in error and not (tmp_path / "run" / "final").exists()
    assert main([*flags, "--resume"]) == 2  # it stays an error
    assert "none of the 2 updates trained anything" in capsys.readouterr().err
    assert main([*flags, "--resume", "--train.give_up_after", "0"]) == 0
    assert (tmp_path / "run" / "final" / "config.json").is_file()


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
