"""What a resumed run is held to, what it may change, and what is found where something on the disk is wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from real_fast.config import Config
from real_fast.runs import checkpoint
from real_fast.runs.fingerprints import settings_of
from real_fast.train import main
from real_fast.utils.jsonio import read_jsonl
from tests.golden.trajectories import run_flags
from tests.helpers import metric_lines, same_weights

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "{{ instruction }}\n{{ response }}\nScore it, {{ phrase }}\n"


def write_rows(path, changes=(), count=14):
    rows = [
        {
            "instruction": f"Question {i}?",
            "response": f"Answer {i}.",
            "rubric": "Is it right?",
            "score": 1 + i % 5,
            "feedback": f"It is answer {i}.",
        }
        for i in range(count)
    ]
    for place, change in changes:
        rows[place] |= change
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Run:
    """A run of two updates in a folder with everything that it reads, as a user would edit it."""

    def __init__(self, home):
        self.home, self.output = home, home / "run"

    def __call__(self, *more):
        flags = run_flags(self.home / "model", self.output, *more)
        own = ["--data.train", str(self.home / "train.jsonl"), "--data.eval", str(self.home / "eval.jsonl")]
        own += ["--data.max_train", "0", "--prompt.template", str(self.home / "mine.jinja"), "--save.every", "1"]
        own += ["--save.keep", "3", "--warmup.steps", "0", "--rollout.max_tokens", "6", "--train.steps", "2"]
        own += ["--optim.schedule", "constant", "--objective.kl_every", "0"]
        return main([*flags[:2], *own, *flags[2:], *more])


@pytest.fixture(scope="module")
def made(golden_model, tmp_path_factory):
    home = tmp_path_factory.mktemp("resume")
    shutil.copytree(golden_model, home / "model")
    write_rows(home / "train.jsonl")
    write_rows(home / "eval.jsonl", [(i, {"instruction": f"Held out {i}?"}) for i in range(4)], count=4)
    (home / "mine.jinja").write_text(TEMPLATE, encoding="utf-8")
    run = Run(home)
    assert run() == 0
    return home


@pytest.fixture
def finished(made, tmp_path):
    shutil.copytree(made, tmp_path / "home")
    return Run(tmp_path / "home")


@pytest.fixture
def run(finished):
    """As a kill behind the last checkpoint leaves it."""
    (finished.output / "summary.json").unlink()
    shutil.rmtree(finished.output / "final")
    return finished


CHANGED = {
    "scale.values": "[1, 2, 3, 4]",
    "scale.phrase": "The score is ",
    "prompt.system": "Grade well.",
    "prompt.max_tokens": "1500",
    "prompt.chat_template_kwargs": '{"enable_thinking": false}',
    "method": "binary_rl",
    "seed": "1",
    "objective.lam": "0.5",
    "objective.beta": "0.1",
    "objective.reward": "authors",
    "objective.kl_coef": "0.1",
    "objective.num_iterations": "2",
    "rollout.group_size": "3",
    "rollout.prompts_per_step": "2",
    "rollout.temperature": "0.7",
    "rollout.top_p": "0.9",
    "rollout.max_tokens": "7",
    "rollout.answer": "generated",
    "optim.lr": "0.1",
    "optim.schedule": "cosine",
    "optim.weight_decay": "0.5",
    "warmup.steps": "1",
    "eval.protocol": "decode",
    "eval.n": "2",
    "train.precision": "bf16",
}


@pytest.mark.parametrize("key", CHANGED)
def test_a_changed_setting_is_refused_with_both_values(run, key, capsys):
    assert run("--resume", f"--{key}", CHANGED[key]) == 2
    error = capsys.readouterr().err
    old = yaml.safe_load((run.output / "config.yaml").read_text(encoding="utf-8"))
    for part in key.split("."):
        old = old[part]
    assert f"{key} = " in error and f"which was {old!r}" in error and "--allow-changed" in error


def edit_template(home):
    (home / "mine.jinja").write_text(TEMPLATE + "Be strict.\n", encoding="utf-8")


def edit_tokenizer(home):
    file = home / "model" / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"<pad>"', '"<fill>"'), encoding="utf-8")
    config = home / "model" / "tokenizer_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"<pad>"', '"<fill>"'), encoding="utf-8")


def edit_chat_template(home):
    text = "{% for m in messages %}{{ m.content }}{% endfor %}!"
    (home / "model" / "chat_template.jinja").write_text(text, encoding="utf-8")


def edit_end(home):
    file = home / "model" / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(values | {"eos_token": values["pad_token"]}), encoding="utf-8")


def edit_weights(home):
    file = home / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


def edit_model(home):
    file = home / "model" / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(values | {"rms_norm_eps": 1e-3}), encoding="utf-8")


CONTENTS = {
    "the labels of the training rows": lambda home: write_rows(home / "train.jsonl", [(3, {"score": 5})]),
    "the training rows: 13 rows": lambda home: write_rows(home / "train.jsonl", count=13),
    "the training rows: 14 rows": lambda home: write_rows(home / "train.jsonl", [(3, {"response": "Another."})]),
    "the feedback of the training rows": lambda home: write_rows(home / "train.jsonl", [(3, {"feedback": "No."})]),
    "the labels of the held-out rows": lambda home: write_rows(
        home / "eval.jsonl", [(i, {"instruction": f"Held out {i}?", "score": 2}) for i in range(4)], count=4
    ),
    "the text of prompt.template": edit_template,
    "the tokenizer's vocabulary": edit_tokenizer,
    "the token that ends a text": edit_end,
    "the model's chat template": edit_chat_template,
    "the model's config.json": edit_model,
    "the start weights": edit_weights,
}


@pytest.mark.parametrize("what", CONTENTS)
def test_changed_contents_are_refused_by_name(run, what, capsys):
    CONTENTS[what](run.home)
    before = sorted(run.output.rglob("*"))
    assert run("--resume") == 2
    error = capsys.readouterr().err
    assert what in error and "which was" in error
    assert sorted(run.output.rglob("*")) == before


def test_what_is_allowed_to_change_goes_on_and_is_said(run, capsys):
    write_rows(run.home / "train.jsonl", [(3, {"score": 5})])
    assert run("--resume", "--allow-changed", "--optim.lr", "0.001", "--train.steps", "3") == 0
    error = capsys.readouterr().err
    assert "resuming with optim.lr = 0.001, which was 0.0003" in error
    assert "resuming with the labels of the training rows" in error
    assert checkpoint.newest(run.output / "checkpoints").name == "step-000003"
    assert run("--resume", "--optim.lr", "0.002", "--train.steps", "4") == 2
    error = capsys.readouterr().err
    assert "optim.lr = 0.002, which was 0.001" in error and "labels" not in error  # they are now the run's own


def test_the_same_rows_may_lie_elsewhere_and_free_settings_may_change(run, capsys):
    moved = run.home / "moved.jsonl"
    (run.home / "train.jsonl").rename(moved)
    free = ["--save.keep", "2", "--log_level", "warning", "--train.micro_batch_tokens", "3000", "--run_name", "b"]
    assert run("--resume", "--data.train", str(moved), *free) == 0
    error = capsys.readouterr().err
    assert "save.keep = 2, which was 3" in error and "data.train" in error
    assert (run.output / "final").is_dir()


def test_the_page_lists_what_may_change():
    page = (ROOT / "docs" / "resuming.md").read_text(encoding="utf-8")
    listed = re.findall(r"`([\w.*]+)`", page.split("<!-- free -->")[1])
    free = {key for key, setting in settings_of(Config()).items() if setting.resume == "free"}
    sections = {name.removesuffix("*") for name in listed if name.endswith("*")}
    assert {key for key in free if not any(key.startswith(s) for s in sections)} == set(listed) - {
        f"{s}*" for s in sections
    }
    assert all(any(key.startswith(s) for key in free) for s in sections)


def test_a_checkpoint_of_an_earlier_version_resumes_with_a_notice(run, capsys):
    for path in (run.output / "checkpoints").iterdir():
        (path / "fingerprints.json").unlink()
        (path / "checksums.json").unlink()
    assert run("--resume", "--optim.lr", "0.001") == 0
    assert "kept no fingerprints" in capsys.readouterr().err


def test_a_finished_run_is_extended_as_if_it_had_been_longer(finished, made, capsys):
    first = json.loads((finished.output / "summary.json").read_text(encoding="utf-8"))
    assert finished("--resume") == 2
    assert "raise train.steps to extend it" in capsys.readouterr().err
    assert finished("--resume", "--train.steps", "3") == 0
    whole = Run(made)
    whole.output = finished.home / "whole"
    assert whole("--train.steps", "3") == 0
    assert metric_lines(finished.output) == metric_lines(whole.output)
    assert same_weights(finished.output, whole.output)
    summary = json.loads((finished.output / "summary.json").read_text(encoding="utf-8"))
    assert (first["steps"], summary["steps"]) == (2, 3) and summary["eval"]["after"] != first["eval"]["after"]
    kept = finished.output / "superseded" / "2-steps"
    assert json.loads((kept / "summary.json").read_text(encoding="utf-8")) == first
    assert {p.name for p in kept.iterdir()} >= {"final", "config.yaml", "report.html", "predictions.jsonl"}
    assert finished("--resume", "--train.steps", "4") == 0
    evaluations = finished.output / "eval" / "superseded"
    assert (evaluations / "after.json").is_file() and (evaluations / "after-2.json").is_file()  # neither is lost
    assert finished("--resume", "--train.steps", "1") == 2
    assert "4 updates, and train.steps is 1" in capsys.readouterr().err
    shutil.rmtree(finished.output / "checkpoints")
    assert finished("--resume", "--train.steps", "5") == 2
    assert "--init_from" in capsys.readouterr().err


def newest(run):
    return run.output / "checkpoints" / "step-000002"


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def forget(path, name):
    sums = json.loads(path.read_text(encoding="utf-8"))
    del sums[name]
    path.write_text(json.dumps(sums), encoding="utf-8")


DAMAGE = {
    "model.safetensors is not as it was written": lambda p: flip_a_bit(p / "model.safetensors"),
    "optimizer.safetensors is not as it was written": lambda p: flip_a_bit(p / "optimizer.safetensors"),
    "optimizer.safetensors is missing": lambda p: (p / "optimizer.safetensors").unlink(),
    "trainer_state.json is not as it was written": lambda p: (p / "trainer_state.json").write_text('{"step": 1}'),
    "trainer_state.json is missing": lambda p: (p / "trainer_state.json").unlink(),
    "it cannot be read": lambda p: (p / "checksums.json").write_text("{"),
    "checksums.json is missing": lambda p: (p / "checksums.json").unlink(),
    "checksums.json does not name ": lambda p: (p / "checksums.json").write_text("{}"),
    "checksums.json does not name optimizer.safetensors": lambda p: forget(
        p / "checksums.json", "optimizer.safetensors"
    ),
    "checksums.json does not name model-00001-of-00001.safetensors": lambda p: shutil.copy(
        p / "model.safetensors", p / "model-00001-of-00001.safetensors"
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(run, what, caplog):
    DAMAGE[what](newest(run))
    assert checkpoint.newest(run.output / "checkpoints").name == "step-000001"
    assert f"going on from step-000001, since what is newer is damaged (step-000002: {what}" in caplog.text


def test_a_users_own_files_are_no_damage(run):
    for name in ("README.md", "notes.json", "scores.safetensors"):
        (newest(run) / name).write_text("mine", encoding="utf-8")
    assert checkpoint.newest(run.output / "checkpoints") == newest(run)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(run, capsys):
    flip_a_bit(newest(run) / "model.safetensors")
    assert run("--resume", "--train.steps", "3") == 0
    assert "step-000002: model.safetensors is not as it was written" in capsys.readouterr().err
    names = {p.name for p in (run.output / "checkpoints").iterdir()}
    assert names == {"step-000001", "step-000002", "step-000002.damaged", "step-000003"}


def test_a_checkpoint_of_an_earlier_version_that_is_cut_off_is_passed_over(run):
    for name in ("fingerprints.json", "checksums.json"):
        (newest(run) / name).unlink()
    file = newest(run) / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert checkpoint.newest(run.output / "checkpoints").name == "step-000001"


def test_where_all_are_damaged_nothing_is_started_over(run, capsys):
    for path in (run.output / "checkpoints").iterdir():
        flip_a_bit(path / "model.safetensors")
    assert run("--resume") == 2
    assert "every checkpoint" in capsys.readouterr().err


def test_other_names_among_the_checkpoints_are_left_alone(run, capsys):
    folder = run.output / "checkpoints"
    shutil.copytree(newest(run), folder / "step-000010 (copy)")
    (folder / "step-abc").mkdir()
    (folder / "step-1").mkdir()
    (folder / "step-notes.txt").write_text("mine", encoding="utf-8")
    (folder / "step-000003.tmp").mkdir()
    assert run("--resume") == 0
    error = capsys.readouterr().err
    assert "step-abc is not a checkpoint's name" in error and "step-000010 (copy) is not" in error
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "step-000000", "step-000001", "step-000002", "step-000010 (copy)", "step-abc", "step-1", "step-notes.txt",
    }  # fmt: skip


def test_a_lost_or_broken_config_yaml_does_not_end_a_run(run):
    (run.output / "config.yaml").unlink()
    assert run() == 2  # it is a run all the same
    (run.output / "config.yaml").write_text("model: [", encoding="utf-8")
    assert run("--resume") == 0


def test_the_template_in_final_is_the_one_that_was_trained_with(run, monkeypatch):
    """Its file may be edited while the run trains; and its name may be that of the model's chat template."""
    from real_fast.train import Trainer

    original = Trainer.step

    def edited(self):
        (run.home / "mine.jinja").write_text("{{ response }} edited", encoding="utf-8")
        return original(self)

    monkeypatch.setattr(Trainer, "step", edited)
    assert run("--resume", "--train.steps", "3") == 0
    settings = json.loads((run.output / "final" / "real_fast.json").read_text(encoding="utf-8"))
    name = settings["prompt"]["template"]
    assert (run.output / "final" / name).read_text(encoding="utf-8") == TEMPLATE and name != "chat_template.jinja"


def test_what_is_broken_in_the_folder_is_named_before_the_work(run, capsys):
    lines = (run.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (run.output / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n", encoding="utf-8")
    assert run("--resume") == 2
    assert "metrics.jsonl, line 2: not valid JSON" in capsys.readouterr().err
    (run.output / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    assert run("--resume") == 2
    assert "a line without a step" in capsys.readouterr().err
    (run.output / "metrics.jsonl").write_text("\n".join(lines) + '\n{"phase": "real", "st', encoding="utf-8")
    assert run("--resume") == 0  # half a last line is what a kill leaves


def test_a_damaged_evaluation_is_made_again_or_left_out(run, capsys):
    file = run.output / "eval" / "after.predictions.jsonl"
    file.write_text(file.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    assert run("--resume") == 0
    assert len(read_jsonl(file)) == 4


def test_a_run_of_which_another_process_is_in_charge_is_not_touched(run, capsys):
    from real_fast.runs.lock import alone_in

    for more in (["--resume"], ["--overwrite"]):
        with alone_in(run.output):
            assert run(*more) == 2
        assert "is being written by process" in capsys.readouterr().err
    assert run("--overwrite", "--train.steps", "1") == 0
    assert not list(run.home.rglob(".lock"))
