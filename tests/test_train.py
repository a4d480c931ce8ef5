"""``python -m real_fast.train`` as a user runs it: end to end, stopped, killed, resumed, and with wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from real_fast import evaluate as evaluation
from real_fast.train import Trainer, main
from real_fast.utils.jsonio import read_jsonl
from tests.helpers import flags, metric_lines, same_weights

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("step_time", "seconds")


@pytest.fixture(scope="session")
def uninterrupted(tiny_judge, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert main(flags(tiny_judge, output)) == 0
    return output


def test_a_run_leaves_everything(uninterrupted):
    found = {p.name for p in uninterrupted.iterdir()}
    assert found >= {
        "config.yaml", "metrics.jsonl", "summary.json", "predictions.jsonl", "rejected.jsonl", "final", "checkpoints",
        "training.png", "before_after.png", "calibration.png",
    }  # fmt: skip
    summary = json.loads((uninterrupted / "summary.json").read_text(), parse_constant=pytest.fail)
    for phase in ("before", "warmup", "after"):
        result = summary["eval"][phase]
        assert result["n"] == 12 and result["no_score"] == 0
        assert {"pearson", "spearman", "kendall", "rmse", "ci95"} <= result.keys()
    assert {"load", "warmup", "rollout", "update", "optimizer", "eval"} <= summary["seconds"].keys()
    lines = metric_lines(uninterrupted)
    assert [m["step"] for m in lines if m["phase"] == "warmup"] == [1, 2]
    assert [m["step"] for m in lines if m["phase"] == "real"] == [1, 2, 3, 4, 5]
    real = [m for m in lines if m["phase"] == "real"]
    assert all(m["sampling/sampling_logp_difference/mean"] < 1e-4 for m in real)
    assert len({m["reward"] for m in real}) == 5 and real[-1]["num_tokens"] > real[0]["num_tokens"]
    predictions = read_jsonl(uninterrupted / "predictions.jsonl")
    assert len(predictions) == 12
    for p in predictions:
        assert abs(sum(int(k) * v for k, v in p["distribution"].items()) - p["prediction"]) < 1e-5


def test_stop_by_signal_then_resume_is_bitwise_the_same(tiny_judge, uninterrupted, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    original = Trainer.step

    def interrupted(self):
        if self.state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    assert main(flags(tiny_judge, output)) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (output / "summary.json").exists()
    assert (output / "checkpoints" / "step-000003").is_dir()  # the step was finished, off the save.every grid
    monkeypatch.setattr(Trainer, "step", original)
    assert main(flags(tiny_judge, output, "--resume", "--save.keep", "8")) == 0
    assert "save.keep = 8, which was 9" in capsys.readouterr().err
    assert metric_lines(output) == metric_lines(uninterrupted)
    assert same_weights(output, uninterrupted)


def test_second_signal_stops_at_once_and_keeps_the_checkpoint(tiny_judge, tmp_path, monkeypatch, capsys):
    def twice(self):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on after the second signal")

    monkeypatch.setattr(Trainer, "step", twice)
    assert main(flags(tiny_judge, tmp_path / "run")) == 130
    assert "at once" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "step-000000").is_dir()


def test_killed_then_resumed_is_bitwise_the_same(tiny_judge, uninterrupted, tmp_path):
    """SIGKILL in the middle of a step after a checkpoint: metrics written since are set aside, and come again."""
    output = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    environment |= {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "real_fast.train", *flags(tiny_judge, output)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (output / "checkpoints" / "step-000002").is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    (output / "checkpoints" / "step-000004.tmp").mkdir(exist_ok=True)  # and one half-written
    assert not (output / "summary.json").exists()
    assert main(flags(tiny_judge, output, "--resume")) == 0
    assert metric_lines(output) == metric_lines(uninterrupted)
    assert same_weights(output, uninterrupted)


def test_output_folders_are_not_touched_unless_told(tiny_judge, uninterrupted, tmp_path, capsys):
    assert main(flags(tiny_judge, uninterrupted)) == 2
    assert "finished run" in capsys.readouterr().err
    assert main(flags(tiny_judge, uninterrupted, "--resume")) == 2
    assert "nothing is left to resume" in capsys.readouterr().err
    output = tmp_path / "run"
    output.mkdir()
    (output / "config.yaml").write_text("model: x", encoding="utf-8")
    assert main(flags(tiny_judge, output)) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert main(flags(tiny_judge, output, "--overwrite", "--train.steps", "1", "--warmup.steps", "0")) == 0
    assert (tmp_path / "run.old-1" / "config.yaml").read_text(encoding="utf-8") == "model: x"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--model", "/no/such/model"], "does not exist"),
        (["--data.train", "/no/such/rows.jsonl"], "no such file"),
        (["--scale.values", "[1, 10]"], "score 10 is 2 tokens"),
        (["--rollout.group_size", "1"], "leave_one_out"),
        (["--prompt.template", "/no/such/template.jinja"], "template"),
        (["--output", "/proc/nothing/here"], "cannot be written"),
        (["--prompt.max_tokens", "10"], "prompt"),
        (["--train.micro_batch_tokens", "20"], "train.micro_batch_tokens is 20"),
        (["--warmup.steps", "0", "--objective.baseline", "leave_one_out", "--rollout.top_p", "1.5"], "top_p"),
    ],
)
def test_wrong_input_is_one_clear_line(tiny_judge, tmp_path, changes, message, capsys):
    assert main(flags(tiny_judge, tmp_path / "run", *changes)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("real-fast train: error: ")]
    assert len(error) == 1 and message in error[0]


def test_a_disk_without_room_is_refused_before_the_work(tiny_judge, tmp_path, monkeypatch, capsys):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    assert main(flags(tiny_judge, tmp_path / "run")) == 2
    assert "GiB free" in capsys.readouterr().err


def test_stale_weights_stop_the_run(tiny_judge, tmp_path, monkeypatch, capsys):
    """An engine that kept old weights must not be trained on."""
    original = Trainer.step

    def perturbed(self):
        generate = self.groups.engine.generate

        def stale(prompts, sampling):
            rollouts = generate(prompts, sampling)
            for parameter in self.policy.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
            return rollouts

        self.groups.engine.generate = stale
        return original(self)

    monkeypatch.setattr(Trainer, "step", perturbed)
    assert main(flags(tiny_judge, tmp_path / "run", "--warmup.steps", "0")) == 2
    assert "disagree" in capsys.readouterr().err


def test_rejected_rows_are_reported_and_a_run_goes_on_where_they_are_few(tiny_judge, tmp_path, capsys):
    rows = [
        {
            "instruction": f"Question {i}?",
            "response": "An answer.",
            "rubric": "Is it right?",
            "score": label,
            "feedback": "Fine.",
        }
        for i, label in enumerate([1, "2", 3.5, 5, "good", 7, None, True, 4, 4, 2, 3])
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\nnot json\n", encoding="utf-8")
    output = tmp_path / "run"
    more = ["--data.train", str(data), "--data.eval", "null", "--data.eval_fraction", "0.3", "--train.steps", "1"]
    assert main(flags(tiny_judge, output, *more)) == 2  # 5 of 13 are more than a fifth
    said = capsys.readouterr().err
    assert "5 of 13 records cannot be used, 38%" in said and "data.max_rejected" in said
    assert main(flags(tiny_judge, output, *more, "--data.max_rejected", "0.5")) == 0
    rejected = read_jsonl(output / "rejected.jsonl")
    assert sorted(r["line"] for r in rejected) == [5, 6, 7, 8, 13]
    assert {r["line"]: r["reason"] for r in rejected}[6].startswith("label")
    assert json.loads((output / "summary.json").read_text())["rejected_rows"] == 5


def test_several_named_benchmarks_are_each_reported_with_their_average(tiny_judge, tmp_path, capsys):
    rows = {"instruction": "Name a fruit.", "response": "apple", "rubric": "Is it one?"}
    for name, labels in (("mt", [1, 2, 3, 4]), ("flask", [5, 3, 1])):
        lines = [json.dumps(rows | {"prompt_id": str(i), "score": label}) for i, label in enumerate(labels)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    output = tmp_path / "run"
    more = ["--train.steps", "1", "--warmup.steps", "0", "--eval.on_start", "false"]
    more += ["--data.eval.mt", str(tmp_path / "mt.jsonl"), "--data.eval.flask", str(tmp_path / "flask.jsonl")]
    assert main(flags(tiny_judge, output, *more)) == 0
    after = json.loads((output / "summary.json").read_text())["eval"]["after"]
    mt, flask = after["benchmarks"]["mt"], after["benchmarks"]["flask"]
    assert (mt["n"], flask["n"], after["n"]) == (4, 3, 7)
    assert after["rmse"] == pytest.approx((mt["rmse"] + flask["rmse"]) / 2)
    assert read_jsonl(output / "metrics.jsonl")[-1]["eval"]["benchmarks"].keys() == {"mt", "flask"}
    assert [r["benchmark"] for r in read_jsonl(output / "predictions.jsonl")] == ["mt"] * 4 + ["flask"] * 3
    assert "<td>after: flask</td>" in (output / "report.html").read_text()
    said = capsys.readouterr().out
    assert "\n  mt " in said and "plain average" in said


def test_smollm2_on_real_rows_then_evaluate(smollm2_start, judge_data, tmp_path, capsys):
    output, target = tmp_path / "run", tmp_path / "eval"
    config = tmp_path / "run.yaml"
    config.write_text(
        "rollout: {engine: transformers, prompts_per_step: 2, group_size: 2, max_tokens: 16}\n"
        "warmup: {steps: 1, batch_size: 2}\ntrain: {steps: 2, micro_batch_tokens: 4096}\n"
        "prompt: {template: short, max_tokens: 520}\noptim: {lr: 1.0e-5}\neval: {bootstrap: 50, on_start: false}\n"
        "save: {every: 0, keep: 1}\n",
        encoding="utf-8",
    )
    arguments = [
        "--config",
        str(config),
        "--model",
        str(smollm2_start),
        "--output",
        str(output),
        "--data.max_eval",
        "4",
    ]
    arguments += ["--data.max_rejected", "1"]  # most of these rows are longer than 520 tokens
    rows = str(judge_data / "mt_bench.jsonl")
    assert main([*arguments, "--data.train", str(judge_data / "vicuna.jsonl"), "--data.eval", rows]) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["eval"]["after"]["n"] == 4 and summary["rejected_rows"] > 0
    real = [m for m in read_jsonl(output / "metrics.jsonl") if m["phase"] == "real"]
    assert [m["step"] for m in real] == [1, 2]
    assert all(m["sampling/sampling_logp_difference/mean"] < 0.1 for m in real)
    argv = ["--model", str(output / "final"), "--data", rows, "--output", str(target), "--max_rejected", "1"]
    argv += ["--max_rows", "4", "--rollout.engine", "transformers", "--bootstrap", "20"]
    assert evaluation.main(argv) in (0, None)
    again = json.loads((target / "summary.json").read_text())
    assert again["n"] == 4 and again["no_score"] == 0


def test_generated_answers_without_a_score_are_masked_out_and_counted(tiny_judge, tmp_path):
    """A random model never writes the phrase: nothing is graded, nothing is made up, and nothing breaks."""
    output = tmp_path / "run"
    more = ["--rollout.answer", "generated", "--train.steps", "2", "--warmup.steps", "0", "--optim.weight_decay", "0"]
    assert main(flags(tiny_judge, output, *more, "--train.give_up_after", "0")) == 0
    real = [m for m in read_jsonl(output / "metrics.jsonl") if m["phase"] == "real"]
    assert [m["score/no_score"] for m in real] == [9, 9] and [m["loss"] for m in real] == [0, 0]
    assert all(m["reward"] is None and m["grad_norm"] == 0 for m in real)
    summary = json.loads((output / "summary.json").read_text())["eval"]["after"]
    assert summary["no_score"] == 12 and summary["pearson"] is None and summary["reasons"]["pearson"]
    start = load_file(tiny_judge / "model.safetensors")
    assert all(torch.equal(start[k], v) for k, v in load_file(output / "final" / "model.safetensors").items())


def test_an_evaluation_cut_off_by_ctrl_c_is_made_on_resume(tiny_judge, tmp_path, monkeypatch):
    output = tmp_path / "run"
    more = ["--eval.every", "2", "--train.steps", "3"]
    whole = tmp_path / "whole"
    assert main(flags(tiny_judge, whole, *more)) == 0
    original = Trainer.evaluate

    def interrupted(self, name):
        if name == "step-000002":
            os.kill(os.getpid(), signal.SIGINT)
        original(self, name)

    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    assert main(flags(tiny_judge, output, *more)) == 130
    monkeypatch.setattr(Trainer, "evaluate", original)
    assert main(flags(tiny_judge, output, *more, "--resume")) == 0
    assert metric_lines(output) == metric_lines(whole)
    assert [m["name"] for m in metric_lines(output) if m["phase"] == "eval"] == [
        "before",
        "warmup",
        "step-000002",
        "after",
    ]


def test_a_loss_that_is_not_finite_is_skipped_and_counted(tiny_judge, tmp_path, monkeypatch):
    """The reference has no such guard: one bad batch would be the end of the weights."""
    original = Trainer.step

    def poisoned(self):
        if self.state.step != 1:
            return original(self)
        weight = self.policy.model.model.norm.weight
        kept, generate = weight.data.clone(), self.groups.engine.generate

        def sampled_then_poisoned(prompts, sampling):
            rollouts = generate(prompts, sampling)
            weight.data.fill_(float("nan"))
            return rollouts

        self.groups.engine.generate = sampled_then_poisoned
        record = original(self)
        self.groups.engine.generate = generate
        weight.data.copy_(kept)
        return record

    monkeypatch.setattr(Trainer, "step", poisoned)
    output = tmp_path / "run"
    assert main(flags(tiny_judge, output, "--train.steps", "3", "--rollout.check_every", "1")) == 0
    real = [m for m in read_jsonl(output / "metrics.jsonl") if m["phase"] == "real"]
    assert [m["skipped_steps"] for m in real] == [0, 1, 1] and real[1]["loss"] is None
    assert json.loads((output / "summary.json").read_text())["skipped_steps"] == 1


def test_a_typo_does_not_displace_an_earlier_run(tiny_judge, uninterrupted, tmp_path):
    before = sorted(p.name for p in uninterrupted.iterdir())
    assert main(flags(tiny_judge, uninterrupted, "--overwrite", "--data.train", "/no/such/rows.jsonl")) == 2
    assert sorted(p.name for p in uninterrupted.iterdir()) == before
    assert not uninterrupted.with_name("whole.old-1").exists()
    assert main(flags(tiny_judge, tmp_path / "run", "--data.train", "/no/such/rows.jsonl")) == 2
    assert main(flags(tiny_judge, tmp_path / "run", "--train.steps", "0", "--warmup.steps", "0")) == 0
