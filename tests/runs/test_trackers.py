"""``report_to`` with stand-ins for the packages, which are not needed: names, steps, resume, failures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

import pytest

from real_fast.config import Config
from real_fast.methods import tract
from real_fast.runs.trackers import Trackers, names, numbers
from real_fast.train import Trainer, main
from real_fast.utils.jsonio import read_jsonl
from tests.helpers import SUPERVISED, metric_lines
from tests.helpers import flags as run_flags

STATUS = {"failed": 1, "stopped": 130}
STEP = Trainer.step


class Services:
    """What the three services were told: `curves` by run, as (name, step) to the values that came, and the rest."""

    def __init__(self):
        self.started, self.finished, self.curves, self.broken = [], [], {}, set()

    def add(self, tracker, run, step, values):
        if tracker in self.broken:
            raise ConnectionError("no route to host")
        curve = self.curves.setdefault((tracker, run), {})
        for name, value in values.items():
            assert type(value) in (int, float) and value == value
            curve.setdefault((name, step), []).append(value)

    def steps(self, tracker, name):
        """The steps of a curve of the one run of a tracker, in the order in which they came."""
        (curve,) = [c for (t, _), c in self.curves.items() if t == tracker]
        assert all(len(values) == 1 for values in curve.values()), "a step came twice"
        return [step for n, step in curve if n == name]


@pytest.fixture
def services(monkeypatch):
    """Stand-ins in sys.modules, with the calls that the trainer makes and the rules that count here."""
    services = Services()

    class Run:
        def __init__(self, run):
            self.id, self.axes, self.config = run, {}, SimpleNamespace(update=self.update)

        def update(self, config, allow_val_change):
            assert allow_val_change and config["train"]["steps"]

        def define_metric(self, name, step_metric=None, step_sync=None):
            self.axes[name] = step_metric

        def log(self, values):
            assert self.axes["*"] == "train/global_step"  # W&B's own steps would drop what is not new
            services.add("wandb", self.id, values.pop("train/global_step"), values)

        def finish(self, exit_code):
            services.finished.append(("wandb", exit_code))

    def wandb_init(project, name, id, resume):
        assert resume == "allow"
        services.started.append(("wandb", project, name, id))
        return Run(id)

    def trackio_init(project, name, config, resume):
        assert resume == "allow" and config["method"]
        services.started.append(("trackio", project, name))
        trackio.run = name

    class SummaryWriter:
        def __init__(self, log_dir, purge_step=None):
            services.started.append(("tensorboard", log_dir, purge_step))
            self.run = log_dir
            if purge_step is not None:
                curve = services.curves[("tensorboard", log_dir)]
                services.curves[("tensorboard", log_dir)] = {k: v for k, v in curve.items() if k[1] < purge_step}

        def add_text(self, name, text, step):
            assert "method: " in text

        def add_scalar(self, name, value, step):
            services.add("tensorboard", self.run, step, {name: value})

        def flush(self):
            pass

        def close(self):
            services.finished.append(("tensorboard",))

    wandb, trackio, tensorboard = (ModuleType(n) for n in ("wandb", "trackio", "torch.utils.tensorboard"))
    wandb.init = wandb_init
    trackio.init, trackio.run = trackio_init, None
    trackio.log = lambda values, step: services.add("trackio", trackio.run, step, values)
    trackio.finish = lambda: services.finished.append(("trackio",))
    tensorboard.SummaryWriter = SummaryWriter
    for module in (wandb, trackio, tensorboard):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return services


def flags(model, output, *more):
    """The run of test_train, made smaller."""
    small = ["--rollout.prompts_per_step", "2", "--rollout.group_size", "2", "--rollout.max_tokens", "3"]
    return run_flags(model, output, *small, "--data.max_eval", "6", "--eval.bootstrap", "10", *more)


ALL = ["--report_to", "[tensorboard,trackio,wandb]"]


def stopping(step, how):
    """Trainer.step that ends the run in the update after `step`."""

    def stepped(self):
        if self.state.step == step:
            how()
        return STEP(self)

    return stepped


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def fail():
    raise ZeroDivisionError


def test_every_number_once_and_at_one_step_count(tiny_judge, tmp_path, services, monkeypatch):
    monkeypatch.setenv("TRACKIO_PROJECT", "judges")
    output = tmp_path / "fast"
    assert main(flags(tiny_judge, output, *ALL, "--eval.every", "3", "--eval.n", "2")) == 0
    (tensorboard, trackio, wandb) = sorted(services.started)
    run = json.loads((output / "trackers.json").read_text())["id"]
    assert wandb == ("wandb", "real-fast", "fast", run) and trackio == ("trackio", "judges", f"fast-{run}")
    assert tensorboard == ("tensorboard", str(output / "tensorboard"), None)
    assert sorted(services.finished) == [("tensorboard",), ("trackio",), ("wandb", 0)]
    for tracker in ("tensorboard", "trackio", "wandb"):  # two steps of warm-up, five of REAL
        assert services.steps(tracker, "warmup/loss") == [1, 2]
        assert services.steps(tracker, "train/reward") == [3, 4, 5, 6, 7]
        assert services.steps(tracker, "eval/rmse") == services.steps(tracker, "eval/decoded/n") == [0, 2, 5, 7]
    lines = read_jsonl(output / "metrics.jsonl")
    curve = services.curves["wandb", run]
    last = [m for m in lines if m["phase"] == "real"][-1]
    for name, value in last.items():
        numeric = isinstance(value, float | int) and name != "step"
        assert curve.get((f"train/{name}", 7)) == ([value] if numeric else None)
    evaluated = {name: value for (name, step), [value] in curve.items() if step == 7 and name.startswith("eval/")}
    assert evaluated == numbers(lines[-1]["eval"], "eval")


@pytest.mark.parametrize("how", ["stopped", "failed"])
def test_a_resumed_run_goes_on_in_its_curves(tiny_judge, tmp_path, services, monkeypatch, how):
    """Stopped: with a checkpoint of step 3. Failed in step 4: steps are made again, from the checkpoint of step 2."""
    output = tmp_path / "run"
    monkeypatch.setattr(Trainer, "step", stopping(*{"stopped": (2, interrupt), "failed": (3, fail)}[how]))
    if how == "stopped":
        assert main(flags(tiny_judge, output, *ALL)) == 130
    else:
        with pytest.raises(ZeroDivisionError):
            main(flags(tiny_judge, output, *ALL))
    assert sorted(services.finished) == [("tensorboard",), ("trackio",), ("wandb", STATUS[how])]
    monkeypatch.setattr(Trainer, "step", STEP)
    assert main(flags(tiny_judge, output, *ALL, "--resume")) == 0
    assert len({start[3] for start in services.started if start[0] == "wandb"}) == 1
    assert len({start[2] for start in services.started if start[0] == "trackio"}) == 1
    again = {"stopped": 2 + 3 + 1, "failed": 2 + 2 + 1}[how]
    assert [start[2] for start in services.started if start[0] == "tensorboard"] == [None, again]
    for tracker in ("tensorboard", "trackio", "wandb"):
        assert services.steps(tracker, "warmup/loss") == [1, 2]
        assert services.steps(tracker, "train/reward") == [3, 4, 5, 6, 7]
        assert services.steps(tracker, "eval/rmse") == [0, 2, 7]


def test_an_evaluation_that_a_signal_cut_off_is_not_missing(tiny_judge, tmp_path, services, monkeypatch):
    """Its step has been logged already, by the update before it."""
    original = Trainer.evaluate

    def interrupted(self, name):
        if name == "after":
            interrupt()
        original(self, name)

    output = tmp_path / "run"
    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    assert main(flags(tiny_judge, output, *ALL, "--train.steps", "2")) == 130
    monkeypatch.setattr(Trainer, "evaluate", original)
    assert main(flags(tiny_judge, output, *ALL, "--train.steps", "2", "--resume")) == 0
    for tracker in ("tensorboard", "trackio", "wandb"):
        assert services.steps(tracker, "eval/rmse") == [0, 2, 4]
        assert services.steps(tracker, "train/reward") == [3, 4]


def test_a_tracker_that_fails_is_left_out_and_caught_up_on_resume(tiny_judge, tmp_path, services, monkeypatch, capsys):
    output = tmp_path / "run"

    def stepped(self):
        if self.state.step == 1:
            services.broken.add("wandb")
        if self.state.step == 3:
            interrupt()
        return STEP(self)

    monkeypatch.setattr(Trainer, "step", stepped)
    assert main(flags(tiny_judge, output, *ALL)) == 130
    error = capsys.readouterr().err
    assert error.count("wandb failed (ConnectionError: no route to host)") == 1 and "from step 4 on" in error
    assert services.steps("wandb", "train/reward") == [3]
    assert services.steps("trackio", "train/reward") == [3, 4, 5, 6]
    assert [m["step"] for m in metric_lines(output) if m["phase"] == "real"] == [1, 2, 3, 4]
    services.broken.clear()
    monkeypatch.setattr(Trainer, "step", STEP)
    assert main(flags(tiny_judge, output, *ALL, "--resume")) == 0
    assert services.steps("wandb", "train/reward") == [3, 4, 5, 6, 7]
    assert services.steps("trackio", "train/reward") == [3, 4, 5, 6, 7]


def test_a_tracker_added_on_resume_gets_the_whole_run(tiny_judge, tmp_path, services, monkeypatch):
    output = tmp_path / "run"
    services.broken.add("trackio")
    monkeypatch.setattr(Trainer, "step", stopping(2, interrupt))
    assert main(flags(tiny_judge, output, "--report_to", "trackio")) == 130
    assert not services.curves
    services.broken.clear()
    monkeypatch.setattr(Trainer, "step", STEP)
    assert main(flags(tiny_judge, output, *ALL, "--resume")) == 0
    for tracker in ("tensorboard", "trackio", "wandb"):
        assert services.steps(tracker, "eval/rmse") == [0, 2, 7]
        assert services.steps(tracker, "warmup/loss") == [1, 2]
        assert services.steps(tracker, "train/reward") == [3, 4, 5, 6, 7]
    assert all(start[2] is None for start in services.started if start[0] == "tensorboard")


def test_overwrite_is_another_run(tiny_judge, tmp_path, services):
    output = tmp_path / "run"
    short = ["--train.steps", "1", "--warmup.steps", "0", "--report_to", "wandb"]
    assert main(flags(tiny_judge, output, *short)) == 0
    assert main(flags(tiny_judge, output, *short, "--overwrite")) == 0
    assert len(services.curves) == 2 and (tmp_path / "run.old-1" / "trackers.json").is_file()
    assert all({n for n, _ in curve} >= {"train/reward", "eval/rmse"} for curve in services.curves.values())


@pytest.mark.parametrize("method", ["real", "tract"])
@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_is_said_before_the_work(tiny_judge, tmp_path, monkeypatch, capsys, tracker, method):
    module = "torch.utils.tensorboard" if tracker == "tensorboard" else tracker
    # None: not there. Without its functions: a folder of that name in the working directory.
    output = tmp_path / "run"
    (output / "stage1").mkdir(parents=True)
    for found in (None, ModuleType(module)):
        monkeypatch.setitem(sys.modules, module, found)
        more = ["--report_to", tracker, "--method", method, "--model", "/no/such/model", "--overwrite"]
        assert main([*flags(tiny_judge, output), *more]) == 2
        assert f"pip install 'real-fast[{tracker}]'" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["run"]  # nothing was moved aside


def test_a_tracker_that_does_not_start_leaves_the_earlier_run_alone(tiny_judge, tmp_path, services, capsys):
    def refused(**_):
        raise PermissionError("no API key")

    sys.modules["wandb"].init = refused
    output = tmp_path / "run"
    output.mkdir()
    (output / "config.yaml").write_text("model: x", encoding="utf-8")
    assert main(flags(tiny_judge, output, "--overwrite", "--report_to", "[trackio,wandb]")) == 2
    error = capsys.readouterr().err
    assert "wandb does not start (PermissionError: no API key)" in error and "WANDB_MODE=offline" in error
    assert services.finished == [("trackio",)] and [p.name for p in tmp_path.iterdir()] == ["run"]
    assert [p.name for p in output.iterdir()] == ["config.yaml"]


def test_an_upload_that_hangs_or_fails_at_the_end_does_not_undo_the_run(tiny_judge, tmp_path, services, capsys):
    def impatient():
        raise KeyboardInterrupt

    sys.modules["trackio"].finish = impatient
    assert main(flags(tiny_judge, tmp_path / "run", *ALL, "--train.steps", "1", "--warmup.steps", "0")) == 0
    assert "trackio was not finished (KeyboardInterrupt)" in capsys.readouterr().err
    assert ("wandb", 0) in services.finished and (tmp_path / "run" / "summary.json").is_file()


def test_a_copy_of_a_run_has_curves_of_its_own(tmp_path, services, caplog):
    def ids(folder):
        config = Config(output=str(folder), report_to="wandb")
        trackers = Trackers(config, SimpleNamespace(path=folder, resumed=True), 1)
        trackers.log({"phase": "real", "step": 1 + len(services.started), "loss": 1.0})
        return services.started[-1][3]

    output, copy, moved = (tmp_path / name for name in ("run", "copy", "moved"))
    output.mkdir()
    first = ids(output)
    shutil.copytree(output, copy)
    assert ids(copy) != first and f"{copy} is a copy of {output}" in caplog.text
    output.rename(moved)
    assert ids(moved) == first == ids(moved)
    (moved / "trackers.json").write_text("{", encoding="utf-8")
    assert ids(moved) != first and "trackers.json is damaged" in caplog.text


def test_tracts_two_stages_are_two_runs(tiny_judge, tmp_path, services, monkeypatch):
    def finished(stage, config, sample=tract.sample_feedback):
        rollouts = sample(stage, config)
        for group in rollouts:
            group[0].finish = "eos"
        return rollouts

    monkeypatch.setattr(tract, "sample_feedback", finished)
    output = tmp_path / "judge"
    more = [*SUPERVISED, "--method", "tract", "--data.max_train", "20", *ALL]
    assert main(flags(tiny_judge, output, *more)) == 0
    wandb = [start for start in services.started if start[0] == "wandb"]
    assert [name for _, _, name, _ in wandb] == ["judge-stage1", "judge-stage2"] and wandb[0][3] != wandb[1][3]
    assert Counter(tracker for tracker, _ in services.curves) == {"tensorboard": 2, "trackio": 2, "wandb": 2}
    folders = [start[1] for start in services.started if start[0] == "tensorboard"]
    assert folders == [str(output / "stage1" / "tensorboard"), str(output / "tensorboard")]
    for curve in services.curves.values():
        assert [step for name, step in curve if name == "train/loss"] == [1, 2, 3]


def test_no_tracker_leaves_no_trace(tiny_judge, tmp_path, services):
    output = tmp_path / "run"
    assert main(flags(tiny_judge, output, "--train.steps", "0", "--warmup.steps", "0")) == 0
    assert not services.started and not (output / "trackers.json").exists()


def test_one_name_or_a_list(capsys):
    assert names(Config(report_to="wandb")) == ["wandb"]
    assert names(Config(report_to=["wandb", "trackio", "wandb"])) == ["wandb", "trackio"] and names(Config()) == []
    with pytest.raises(SystemExit):
        main(["--report_to", "mlflow"])
    assert "report_to" in capsys.readouterr().err


def test_numbers_alone_are_logged():
    record = {"loss": 0.5, "skipped": True, "reward": None, "phase": "real", "ci95": {"mae": [1.0, 2.0], "rmse": None}}
    found = numbers(record, "train")
    assert found == {"train/loss": 0.5, "train/skipped": 1, "train/ci95/mae/low": 1.0, "train/ci95/mae/high": 2.0}
    assert type(found["train/skipped"]) is int
