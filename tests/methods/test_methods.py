"""The methods beside REAL: their losses against plain autograd, and each from the command line to a judge."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from real_fast.batching.micro_batches import micro_batches
from real_fast.config import ObjectiveConfig
from real_fast.methods import tract
from real_fast.methods.base import UpdateCounts
from real_fast.methods.binary_rl import draw_scores, outcome_reward
from real_fast.methods.raft import RAFT
from real_fast.methods.sft import SFT
from real_fast.methods.supervised import LossWeights, pick_feedback, supervised_group, supervised_loss
from real_fast.model.policy import Policy
from real_fast.score.scale import ScoreScale
from real_fast.train import main
from real_fast.types import Group, JudgeRow, Rollout
from real_fast.utils.jsonio import read_jsonl
from real_fast.utils.seeds import random_stream
from tests.helpers import SCALE, SUPERVISED, flags, make_groups, make_method
from tests.oracles import naive_advantages

LONG = 10**6


class Words:
    """A tokenizer of one token a word."""

    def encode(self, text, add_special_tokens=False):
        return [3 + sum(map(ord, word)) % 40 for word in text.split()]


def words(texts):
    """Token ids of several texts."""
    return [Words().encode(text) for text in texts]


def judged_rows():
    rows = [
        JudgeRow("a", "a", "", "", "", "", 2.0, ["one two three", "four five", "six"], [1.0, 2.5, 3.0], [9, 8, 7]),
        JudgeRow("b", "b", "", "", "", "", 1.5, ["seven"], [1.5], [9, 5, 4, 3, 2]),
    ]
    return rows


def log_softmax(policy, prompt, response):
    return policy.model(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)


def gradients(policy, loss):
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


def assert_same(loss, grads, want, want_grads):
    # Llama's norms and rotary embeddings compute in float32 even in a float64 model.
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-7)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("terms", [SFT, RAFT, LossWeights(feedback=1.0, squared_error=0.5)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("most", [0, 1, 3])
@pytest.mark.parametrize("end", [None, 44])
def test_supervised_loss_against_one_answer_at_a_time(tiny_llama, terms, shared, most, end):
    """Several answers of one prompt in one packed row, each with a label of its own, and an end behind its score."""
    policy = Policy(tiny_llama().double(), attention="sdpa" if shared else None)
    rows = judged_rows()
    groups = [
        supervised_group(row, list(range(len(row.feedbacks)))[:most], n, words, replace(SCALE, end_id=end))
        for n, row in enumerate(rows)
    ]
    cross, score, squared, ends, tokens, answers = 0.0, 0.0, 0.0, 0.0, 0, 0
    for row in rows:
        texts = [(Words().encode(f), y) for f, y in zip(row.feedbacks, row.feedback_labels, strict=True)][:most]
        for ids, label in texts or [([], row.label)]:
            response = [*ids, 60, 61]
            nearest = min(range(3), key=lambda i: abs(SCALE.values[i] - label))
            logp = log_softmax(policy, row.prompt_ids, [*response, SCALE.score_ids[nearest]])
            start = len(row.prompt_ids) - 1
            if end is not None:
                ends -= logp[-1, end]
                tokens += 1
            if texts:
                cross -= sum(logp[start + i, token] for i, token in enumerate(response))
                tokens += len(response)
            found = logp[-2, list(SCALE.score_ids)]
            low = int(label) - 1 if label < 3 else 1
            share = label - SCALE.values[low]
            score -= (1 - share) * found[low] + share * found[low + 1]
            squared += ((found.exp() * torch.tensor(SCALE.values)).sum() - label) ** 2
            answers += 1
    tokens = max(tokens, 1)  # as UpdateCounts counts them
    count = tokens * bool(terms.feedback) + answers * bool(terms.score)
    want = (terms.squared_error * squared + terms.end * ends) / answers
    if count:
        want = want + (terms.feedback * (cross + ends) + terms.score * score) / count
    want_grads = gradients(policy, want)
    totals, loss, parts = UpdateCounts.of(groups), 0.0, 0.0
    policy.zero_grad()
    for batch in micro_batches(groups, 40, 0, shared):  # several micro-batches
        out = policy(batch, supervised_loss(terms, SCALE, totals))
        out.loss.backward()
        loss, parts = loss + out.loss.detach(), parts + sum(out.parts.values())
    grads = {name: p.grad.clone() for name, p in policy.named_parameters()}
    assert_same(loss, grads, want.detach(), want_grads)
    torch.testing.assert_close(parts, loss)


@pytest.mark.parametrize("changes", [{}, {"loss_norm": "token_mean", "normalize_std": False, "advantage_clip": 0.0}])
def test_binary_loss_against_full_logits(tiny_llama, changes):
    policy, config = Policy(tiny_llama().double(), attention="sdpa"), ObjectiveConfig(**changes)
    groups = make_groups(3, n=4, k=4, missing=True)
    for group in groups:
        for i, rollout in enumerate(group.rollouts):
            if rollout.has_score:
                rollout.outcome = (i + group.index) % 4  # 3: off the scale
    want, valid, count = 0.0, 0, 0
    pieces = []
    for group in groups:
        distances = [abs(value - group.label) for value in SCALE.values]
        members = [r for r in group.rollouts if r.has_score]
        rewards = [float(r.outcome < 3 and distances[r.outcome] == min(distances)) for r in members]
        advantages = naive_advantages(rewards, config.baseline, config.normalize_std, config.advantage_clip)
        for rollout, a in zip(members, advantages, strict=True):
            logp = log_softmax(policy, group.prompt_ids, rollout.context_ids)
            start = len(group.prompt_ids) - 1
            text = sum(logp[start + i, token] for i, token in enumerate(rollout.sampled_ids))
            found = logp[-1, list(SCALE.score_ids)]
            score = torch.log(1 - found.exp().sum()) if rollout.outcome == 3 else found[rollout.outcome]
            pieces.append(-a * (text + score))
            valid, count = valid + 1, count + len(rollout.sampled_ids)
    want = sum(pieces) / (valid if config.loss_norm == "sequence_sum" else count)
    want_grads = gradients(policy, want)
    policy.zero_grad()
    loss = 0.0
    for batch in micro_batches(groups, 60, 0, shared_prompt=True):
        out = policy(batch, make_method("binary_rl", config).loss(UpdateCounts.of(groups)))
        out.loss.backward()
        loss += out.loss.detach()
    assert_same(loss, {name: p.grad for name, p in policy.named_parameters()}, want.detach(), want_grads)
    assert set(out.rewards.tolist()) <= {0.0, 1.0}


def test_drawn_scores_follow_the_distribution():
    p = torch.tensor([0.1, 0.5, 0.2], dtype=torch.float64)  # 0.2 off the scale
    rollouts = [Rollout([5], [-1.0], [5], 0, "phrase", p.log().tolist(), None) for _ in range(4000)]
    draw_scores([Group(0, [1], 2.0, rollouts)], seed=7)
    found = torch.bincount(torch.tensor([r.outcome for r in rollouts]), minlength=4) / 4000
    assert (found - torch.tensor([0.1, 0.5, 0.2, 0.2])).abs().max() < 0.03
    first = [r.outcome for r in rollouts]
    draw_scores([Group(0, [1], 2.0, rollouts)], seed=7)
    assert [r.outcome for r in rollouts] == first
    draw_scores([Group(0, [1], 2.0, rollouts)], seed=8)
    assert [r.outcome for r in rollouts] != first


def test_a_drawn_score_is_independent_of_the_feedback():
    """The Transformers engine draws a rollout's tokens by random_stream(seed, place, sample), from its first number."""
    rollouts = [
        Rollout([5], [-1.0], [5], 0, "phrase", torch.full((4,), 0.25).log().tolist(), None) for _ in range(4000)
    ]
    draw_scores([Group(3, [1], 2.0, rollouts)], seed=7)
    first = torch.tensor([random_stream(7, 3, place).random() for place in range(4000)])
    scores = torch.tensor([float(r.outcome) for r in rollouts])
    assert abs(torch.corrcoef(torch.stack([first, scores]))[0, 1]) < 0.06  # 1/sqrt(4000) = 0.016


def test_a_label_between_two_scores_rewards_both():
    labels = torch.tensor([3.5, 3.5, 3.5, 3.4, 10 / 3, 3.5, 3.5])
    outcome = torch.tensor([2, 3, 1, 3, 2, 5, -1])
    values = torch.tensor([1.0, 2, 3, 4, 5])
    assert outcome_reward(labels, values, outcome).tolist() == [1, 1, 0, 0, 1, 0, 0]


def test_exploration_and_refinement_add_up(tiny_llama):
    """beta 0 and exploration false are the two halves of the whole gradient."""
    policy, groups = Policy(tiny_llama().double(), attention="sdpa"), make_groups(6)
    found = []
    for changes in ({}, {"beta": 0.0}, {"exploration": False}):
        (batch,) = micro_batches(groups, LONG, 0, shared_prompt=True)
        out = policy(batch, make_method("real", ObjectiveConfig(**changes)).loss(UpdateCounts.of(groups)))
        found.append((out, gradients(policy, out.loss)))
    (whole, g), (explored, g_explored), (refined, g_refined) = found
    torch.testing.assert_close(whole.loss, explored.loss + refined.loss)
    for name in g:
        torch.testing.assert_close(g[name], g_explored[name] + g_refined[name], rtol=1e-5, atol=1e-8)
    assert not refined.computed.any() and len(refined.logprobs) == len(whole.logprobs)
    assert float(refined.parts["exploration"]) == 0


def test_feedback_is_drawn_without_repetition_and_again_alike():
    row = judged_rows()[0]
    assert pick_feedback(row, 5, 0, 3) == [0, 1, 2]
    drawn = {tuple(pick_feedback(row, 2, 0, place)) for place in range(40)}
    assert drawn == {(0, 1), (0, 2), (1, 2)}
    assert pick_feedback(row, 2, 0, 3) == pick_feedback(row, 2, 0, 3)


@pytest.mark.parametrize(
    ("method", "more", "keys"),
    [
        ("sft", [], {"loss/feedback", "loss/score"}),
        ("raft", ["--supervised.feedback", "none"], {"loss/squared_error"}),
        ("raft", ["--supervised.feedback", "none", "--eval.protocol", "raft"], {"loss/squared_error"}),
        ("raft", [], {"loss/squared_error"}),
        ("binary_rl", [], {"loss/feedback", "loss/score", "reward"}),
        ("real", ["--objective.exploration", "false"], {"loss/refinement", "reward"}),
        ("real", ["--objective.beta", "0"], {"loss/exploration", "reward"}),
    ],
)
def test_every_method_trains_a_judge(tiny_judge, tmp_path, method, more, keys, capsys):
    output = tmp_path / "run"
    assert main(flags(tiny_judge, output, "--method", method, *SUPERVISED, *more)) == 0
    lines = [m for m in read_jsonl(output / "metrics.jsonl") if m["phase"] == method]
    assert [m["step"] for m in lines] == [1, 2, 3]
    assert all(keys <= m.keys() and m["score/rmse"] > 0 for m in lines)
    # The first step compares engine and trainer, where there are rollouts.
    compared = "sampling/sampling_logp_difference/mean" in lines[0]
    assert compared == (method in ("real", "binary_rl") and "exploration" not in " ".join(more))
    assert ("reward" in lines[0]) == (method in ("real", "binary_rl"))
    summary = json.loads((output / "summary.json").read_text())
    assert summary["method"] == method and summary["eval"]["after"]["n"] == 12
    assert (output / "final" / "model.safetensors").is_file() and (output / "training.png").is_file()
    assert summary["eval"]["after"]["mean_length"] == 0 or "raft" not in more
    saved = json.loads((output / "final" / "real_fast.json").read_text())
    assert saved["eval"] == {"protocol": "raft" if "raft" in more else "real"}
    assert ("eval.protocol is real" in capsys.readouterr().err) == (more == ["--supervised.feedback", "none"])


def test_tract_in_two_stages_and_real_from_there(tiny_judge, tmp_path, capsys, monkeypatch):
    output = tmp_path / "tract"
    more = [*SUPERVISED, "--method", "tract", "--data.max_train", "20"]
    # A random model ends no feedback by itself, and what is cut off is not trained on.
    assert main(flags(tiny_judge, output, *more)) == 2
    assert "rollout.max_tokens" in capsys.readouterr().err
    assert len(read_jsonl(output / "self_generated.rejected.jsonl")) == 20

    def finished(stage, config, sample=tract.sample_feedback):
        rollouts = sample(stage, config)
        for group in rollouts[1:]:
            group[0].finish = "eos"
        return rollouts

    monkeypatch.setattr(tract, "sample_feedback", finished)
    assert main(flags(tiny_judge, output, *more, "--resume")) == 0
    rows = read_jsonl(output / "self_generated.jsonl")
    given = {r["id"]: r for r in rows}
    assert len(given) == 20 and all(len(r["feedbacks"]) + len(r["unfinished_feedbacks"]) == 1 for r in rows)
    assert all("overall score" not in text for r in rows for text in r["feedbacks"])
    assert sum(len(r["feedbacks"]) for r in rows) == 19
    assert len(read_jsonl(output / "held_out.jsonl")) == 12
    for folder in (output / "stage1", output):
        assert json.loads((folder / "summary.json").read_text())["method"] == "tract"
        assert (folder / "final" / "model.safetensors").is_file()
    assert json.loads((output / "stage1" / "summary.json").read_text())["seconds"]["self_generated"] > 0
    assert main(flags(tiny_judge, output, *more)) == 2 and "holds a run" in capsys.readouterr().err
    kept = (output / "metrics.jsonl").read_text()
    assert main(flags(tiny_judge, output, *more, "--resume")) == 2  # finished, as for every other method
    assert (output / "summary.json").is_file() and (output / "metrics.jsonl").read_text() == kept
    assert main(flags(tiny_judge, tmp_path / "real", "--init_from", str(output), "--train.steps", "1")) == 0
    first = read_jsonl(tmp_path / "real" / "metrics.jsonl")[0]["eval"]
    before = json.loads((output / "summary.json").read_text())["eval"]["after"]
    # The chained run starts where the first one ended (its final weights are kept in 16 bits at most).
    assert first["rmse"] == pytest.approx(before["rmse"], rel=0.05)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "sft", "--supervised.feedback", "none"], "only raft goes without"),
        (["--method", "raft", "--supervised.prompts_per_step", "0"], "supervised.prompts_per_step is 0"),
        (["--objective.exploration", "false", "--objective.beta", "0"], "nothing is left to train"),
        (["--init_from", "nowhere/at/all"], "model nowhere/at/all does not exist"),
        (["--data.train", "LONG", "--train.micro_batch_tokens", "2000"], "row 'long' needs 40"),
        (["--method", "sft", "--train.micro_batch_tokens", "30"], "micro_batch_tokens is 30, and row"),
    ],
)
def test_what_cannot_work_is_said_before_the_work(tiny_judge, tmp_path, more, message, capsys):
    if "LONG" in more:
        row = {"instruction": "Name one.", "response": "x", "rubric": "r", "score": 3, "id": "long"}
        rows = [{**row, "id": str(i), "instruction": f"Name {i}."} for i in range(20)] + [
            row | {"feedback": "So. " * 2000}
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        more = [str(tmp_path / "rows.jsonl") if part == "LONG" else part for part in more]
    assert main(flags(tiny_judge, tmp_path / "run", *more)) == 2
    assert message in capsys.readouterr().err


def test_rows_without_feedback_are_reported(tiny_judge, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    rows = [
        {"instruction": f"Name {i}.", "response": "x", "rubric": "r", "score": 1 + i % 5, "id": str(i)}
        | ({"feedback": "Fine."} if i % 2 else {})
        for i in range(20)
    ]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    output = tmp_path / "run"
    more = [*SUPERVISED, "--method", "sft", "--train.steps", "1", "--data.train", str(data)]
    assert main(flags(tiny_judge, output, *more)) == 2  # half of them are more than a fifth
    assert "10 of 20 rows have no feedback, and method sft is trained on it" in capsys.readouterr().err
    assert main(flags(tiny_judge, output, *more, "--data.max_rejected", "0.5")) == 0
    rejected = read_jsonl(output / "rejected.jsonl")
    assert len(rejected) == 10 and all("no feedback" in r["reason"] for r in rejected)
    none = tmp_path / "none.jsonl"
    none.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "feedback"}) + "\n" for r in rows))
    assert main(flags(tiny_judge, tmp_path / "other", *more, "--data.train", str(none))) == 2


def test_scale_of_the_row_is_the_scale_of_the_loss():
    """Labels between scores and at both ends, as noisy raters give them."""
    scale = ScoreScale((1.0, 3.0, 5.0), ("1", "3", "5"), (50, 51, 52), "score: ", (60, 61), 1)
    row = JudgeRow("a", "a", "", "", "", "", 10 / 3, ["x"], [10 / 3], [9, 8, 7])
    group = supervised_group(row, [0], 0, words, scale)
    assert group.labels == [10 / 3]
