"""Seeing into a run: rollouts.jsonl, --debug, --profile and the levels of messages."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from real_fast.config import Config
from real_fast.config.debug import smaller
from real_fast.train import Trainer, main
from real_fast.utils.jsonio import read_jsonl
from tests.golden.trajectories import run_flags

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def run(golden_model, tmp_path_factory):
    output = tmp_path_factory.mktemp("seen") / "run"
    more = ("--rollout.log_every", "2", "--profile", "1", "--train.steps", "4")
    assert main(run_flags(golden_model, output, *more)) == 0
    return output


def test_rollouts_say_what_the_numbers_are_made_of(run):
    lines = read_jsonl(run / "rollouts.jsonl")
    assert [line["step"] for line in lines] == [1] * 8 + [3] * 8  # every second update, 2 prompts of 4 rollouts
    metrics = {m["step"]: m for m in read_jsonl(run / "metrics.jsonl") if m["phase"] == "real"}
    for start in (0, 8):
        for prompt in (lines[start : start + 4], lines[start + 4 : start + 8]):
            assert [line["rollout"] for line in prompt] == [0, 1, 2, 3] and len({line["id"] for line in prompt}) == 1
            assert sum(line["advantage"] > 0 for line in prompt) in (1, 2, 3)  # leave-one-out: some above, some below
            for line in prompt:
                assert line["text"].endswith("So the overall score is ") and 1 <= line["label"] <= 5
                p = line["distribution"]
                assert sum(p.values()) + line["off_scale_mass"] == pytest.approx(1, abs=1e-5)
                y_hat = sum(float(k) * v for k, v in p.items())
                assert line["expected_score"] == pytest.approx(y_hat, abs=1e-4)
                label = str(int(line["label"]))
                want = -((y_hat - line["label"]) ** 2) + torch.tensor(p[label]).log().item()
                assert line["reward"] == pytest.approx(want, rel=1e-3)
    assert metrics.keys() == {1, 2, 3, 4}


def test_the_newest_rollouts_are_in_the_report(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    newest = [line for line in read_jsonl(run / "rollouts.jsonl") if line["step"] == 3]
    assert "Newest rollouts (update 3)" in page and f"<td>{newest[0]['reward']:.2f}</td>" in page


def test_a_profile_has_a_trace_and_a_table(run):
    trace = json.loads((run / "profile" / "trace.json").read_text(encoding="utf-8"))
    assert any("real_kernels::real_head" in str(event.get("name")) for event in trace["traceEvents"])
    assert "Self CPU" in (run / "profile" / "table.txt").read_text(encoding="utf-8")


def test_given_feedback_is_shown_too(golden_model, tmp_path):
    output = tmp_path / "run"
    assert main(run_flags(golden_model, output, "--method", "sft", "--warmup.steps", "0", "--train.steps", "1")) == 0
    lines = read_jsonl(output / "rollouts.jsonl")
    assert lines and all(line["reward"] is None and "So the overall score is" in line["text"] for line in lines)


def test_a_resumed_run_has_every_rollout_once(golden_model, run, tmp_path, monkeypatch):
    output, original = tmp_path / "run", Trainer.step

    def interrupted(self):
        if self.state.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    more = ("--rollout.log_every", "2", "--train.steps", "4")
    monkeypatch.setattr(Trainer, "step", interrupted)
    assert main(run_flags(golden_model, output, *more)) == 130
    with (output / "rollouts.jsonl").open("a") as file:  # a step that a kill has undone, and half a line
        file.write(json.dumps({"step": 3, "text": "undone"}) + '\n{"step": 3, "te')
    monkeypatch.setattr(Trainer, "step", original)
    assert main(run_flags(golden_model, output, *more, "--resume")) == 0
    assert read_jsonl(output / "rollouts.jsonl") == read_jsonl(run / "rollouts.jsonl")
    assert read_jsonl(output / "rollouts.superseded.jsonl") == [{"step": 3, "text": "undone"}]


def test_debug_is_a_small_run_that_compares_at_every_step(golden_model, tmp_path, monkeypatch, capsys):
    seen = []
    original = Trainer.step

    def watched(self):
        seen.append((torch.is_anomaly_enabled(), torch.are_deterministic_algorithms_enabled()))
        return original(self)

    monkeypatch.setattr(Trainer, "step", watched)
    output = tmp_path / "run"
    assert main(run_flags(golden_model, output, "--debug", "--rollout.check_every", "0")) == 0
    lines = [m for m in read_jsonl(output / "metrics.jsonl") if m["phase"] == "real"]
    assert len(lines) == 3 and seen == [(True, True)] * 3
    assert not torch.is_anomaly_enabled() and not torch.are_deterministic_algorithms_enabled()
    assert len({line["id"] for line in read_jsonl(output / "rollouts.jsonl") if line["step"] == 1}) == 2


def test_smaller_cuts_what_is_large_and_leaves_what_is_small():
    config = Config()
    config.rollout.group_size = 2
    small = smaller(config)
    assert (small.rollout.group_size, small.rollout.prompts_per_step, small.train.steps) == (2, 2, 3)
    assert small.rollout.check_every == 1 and config.rollout.check_every == 20


def test_messages_have_levels(golden_model, tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    flags = run_flags(golden_model, output, "--method", "raft", "--supervised.feedback", "none", "--train.steps", "0")
    assert main([*flags, "--warmup.steps", "0", "--log_level", "error"]) == 0
    assert "eval.protocol" not in capsys.readouterr().err
    assert main([*flags, "--warmup.steps", "0", "--overwrite"]) == 0
    err = capsys.readouterr().err
    assert "warning: eval.protocol is real" in err and "moved the earlier run to" in err
