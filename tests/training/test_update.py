"""From rollouts to the loss: micro-batches, the policy's forward and the objective, against one sequence at a time."""

from __future__ import annotations

import math

import pytest
import torch

from real_fast.batching.micro_batches import micro_batches
from real_fast.config import ObjectiveConfig
from real_fast.methods.base import UpdateCounts
from real_fast.methods.sft import SFT
from real_fast.methods.supervised import supervised_group, supervised_loss
from real_fast.model.policy import Policy
from real_fast.prompt.guard import Guard
from real_fast.score.scale import ScoreScale
from real_fast.training.step_metrics import StepMetrics
from real_fast.types import JudgeRow
from tests.helpers import LONG, SCALE, make_groups, run_update, size
from tests.oracles import naive_real_loss


def policy_of(tiny_llama, shared=True, **config):
    return Policy(tiny_llama(**config).double(), attention="sdpa" if shared else None)


def options(**changes):
    return ObjectiveConfig(**changes)


def naive(policy, groups, config):
    """Every sequence in a forward pass of its own, without padding."""
    sequences = []
    policy.zero_grad()
    for group in groups:
        for rollout in group.rollouts:
            ids = torch.tensor([[*group.prompt_ids, *rollout.context_ids]])
            hidden = policy.model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
            start = len(group.prompt_ids) - 1
            sequences.append(
                {
                    "hidden": hidden[start : start + len(rollout.sampled_ids)],
                    "targets": rollout.sampled_ids,
                    "score_hidden": hidden[-1],
                    "label": group.label,
                    "group": group.index,
                    "valid": rollout.has_score,
                }
            )
    loss, _ = naive_real_loss(
        sequences,
        policy.model.lm_head.weight,
        SCALE.score_ids,
        SCALE.values,
        reward=config.reward,
        lam=config.lam,
        beta=config.beta,
        baseline=config.baseline,
        normalize_std=config.normalize_std,
        advantage_clip=config.advantage_clip,
        loss_norm=config.loss_norm,
        renormalize=config.renormalize,
        temperature=1.0,
    )
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in policy.named_parameters()}


@pytest.mark.parametrize(
    "changes",
    [{}, {"reward": "authors", "beta": 0.01, "loss_norm": "token_mean"}, {"renormalize": True, "lam": 0.3}],
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_update_against_one_sequence_at_a_time(tiny_llama, changes, tied, shared):
    """Would catch the reference's mistakes 1 (log-probs one token early) and 2 (EOS inside the prompt masked out)."""
    policy = policy_of(tiny_llama, shared, tied=tied)
    groups, config = make_groups(missing=True), options(**changes)
    want, want_grads = naive(policy, groups, config)
    loss, grads, _ = run_update(policy, groups, config=config)
    # Llama's norms and rotary embeddings compute in float32 even in a float64 model.
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-7)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", ["sequence_sum", "token_mean"])
@pytest.mark.parametrize("shared", [False, True])
def test_micro_batches_do_not_change_the_update(tiny_llama, norm, shared):
    policy, groups = policy_of(tiny_llama, shared), make_groups(1, n=5, missing=True)
    config = options(loss_norm=norm)
    loss, grads, whole = run_update(policy, groups, config=config)
    largest = max(size(g, shared) for g in groups)
    other, other_grads, split = run_update(policy, groups[::-1], budget=largest, config=config)
    assert len(whole) == 1 and len(split) >= 3
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=1e-7)
    for name, grad in grads.items():
        torch.testing.assert_close(other_grads[name], grad, rtol=1e-5, atol=1e-7)


def test_step_metrics_and_engine_gap(tiny_llama):
    policy, groups = policy_of(tiny_llama), make_groups(4, missing=True)
    largest = max(g.shared_tokens for g in groups)
    _, _, outputs = run_update(policy, groups, budget=largest, compare=True)
    # Let the engine report what the trainer computed: the gap is zero only if everything is matched up right.
    metrics = StepMetrics(groups, SCALE)
    for batch, out in outputs:
        metrics.add(batch, out, 0)
        for i, g in enumerate(batch.group.tolist()):
            rollout = groups[g].rollouts[batch.group[:i].tolist().count(g)]
            rollout.sampled_logprobs = out.logprobs[batch.rollout == i].tolist()
            if rollout.has_score:
                rollout.score_logprobs = out.score_logprobs[i].tolist()
    gap = metrics.compare_engine()
    # float() on the way: the trainer's numbers are rounded to float32
    assert gap.logprob_max < 1e-6 and gap.score_max < 1e-6
    assert gap.tokens == sum(len(r.sampled_ids) for g in groups for r in g.rollouts if r.has_score)
    groups[1].rollouts[1].sampled_logprobs[0] -= 0.5
    assert abs(metrics.compare_engine().logprob_max - 0.5) < 1e-6
    result = metrics.result()
    separate = sum(len(g.prompt_ids) + len(r.context_ids) for g in groups for r in g.rollouts)
    assert result["body/tokens"] == sum(g.shared_tokens for g in groups) and result["body/padding"] == 0
    assert result["body/prompt_tokens_saved"] == separate - result["body/tokens"]
    assert result["score/no_score"] == 3 and result["completions/clipped_ratio"] == pytest.approx(0.25)
    assert metrics.num_tokens == separate
    for _, out in metrics.batches:  # flat over the scores, with hardly any mass on them: no point
        out.score_logprobs = torch.full_like(out.score_logprobs, -12.0)
    assert metrics.result()["score/entropy"] == pytest.approx(math.log(3))
    rewards = metrics.gather("rewards")[metrics.of_batches("rollout_valid")]
    assert result["reward_std"] == pytest.approx(float(rewards.std()))
    y_hat = metrics.gather("expected_score")[metrics.of_batches("rollout_valid")]
    for name, values in (
        ("score", y_hat),
        ("label", metrics.of_batches("labels")[metrics.of_batches("rollout_valid")]),
    ):
        nearest = [min(SCALE.texts, key=lambda text: abs(float(text) - float(v))) for v in values]
        shares = [result[f"{name}/share/{text}"] for text in SCALE.texts]
        assert shares == pytest.approx([nearest.count(text) / len(nearest) for text in SCALE.texts])
    assert result["reward"] < 0 and result["head/rows_dropped"] == 0 + sum(
        len(r.sampled_ids) for g in groups for r in g.rollouts if not r.has_score
    )


def test_cross_entropy_on_given_feedback(tiny_llama, smollm2_tokenizer):
    scale = ScoreScale.from_tokenizer(smollm2_tokenizer, [1, 2, 3, 4, 5], "So the overall score is ")
    policy = Policy(tiny_llama(vocab_size=49152, hidden_size=16).double())
    row = JudgeRow("a", "a", "i", "r", "", "", 2.5, ["Two are wrong.", "Fine."], [2.5, 4.0], [7, 8, 9])
    groups = [supervised_group(row, [i], i, Guard(smollm2_tokenizer, {}).encode_feedback, scale) for i in (0, 1)]
    (batch,) = micro_batches(groups, LONG, 0, shared_prompt=False)
    out = policy(batch, supervised_loss(SFT, scale, UpdateCounts.of(groups)))
    total, count = 0.0, 0
    for text, label in (("Two are wrong.", 2.5), ("Fine.", 4.0)):
        ids = smollm2_tokenizer.encode(f"{text} So the overall score is ", add_special_tokens=False)
        score = 34 if label == 2.5 else 36  # the nearest to the label: "2" and "4"
        logits = policy.model(torch.tensor([[7, 8, 9, *ids, score]])).logits[0].log_softmax(-1)
        for place, token in enumerate(ids):
            total -= logits[2 + place, token]
            count += 1
        low, high = (34, 35) if label == 2.5 else (36, 36)
        total -= 0.5 * logits[-2, low] + 0.5 * logits[-2, high]
        total -= logits[-1, smollm2_tokenizer.eos_token_id]  # the answer's end
        count += 2
    torch.testing.assert_close(out.loss, total / count, rtol=1e-9, atol=1e-9)


def test_advantages_from_the_engine(tiny_llama):
    """The engine's scores give the advantages; the gradient of the reward is the trainer's all the same."""
    policy, groups = policy_of(tiny_llama), make_groups(5, missing=True)
    # Without the division by a group's small spread, which would magnify the rounding of the scores to float32.
    trainer = options(normalize_std=False, advantage_clip=0.0)
    engine = options(normalize_std=False, advantage_clip=0.0, reward_from="engine")
    want, want_grads, outputs = run_update(policy, groups, config=trainer)
    place = {g.index: 0 for g in groups}
    for batch, out in outputs:  # an engine that agrees with the trainer
        for i, g in enumerate(batch.group.tolist()):
            rollout = groups[g].rollouts[place[g]]
            place[g] += 1
            if rollout.has_score:
                rollout.score_logprobs = out.score_logprobs[i].tolist()
    loss, grads, _ = run_update(policy, groups, config=engine)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[name], rtol=1e-4, atol=1e-6)
    rollout = groups[0].rollouts[0]
    rollout.score_logprobs = [-9.0, -9.0, -0.1]
    _, other, changed = run_update(policy, groups, config=engine)
    y_hat = (torch.tensor(rollout.score_logprobs).exp() * torch.tensor(SCALE.values)).sum()
    first = next(i for batch, _ in changed for i, g in enumerate(batch.group.tolist()) if g == 0)
    reward = -((y_hat - groups[0].label) ** 2) - 9.0
    assert float(changed[0][1].rewards[first]) == pytest.approx(float(reward), rel=1e-5)
    assert not torch.allclose(other["model.lm_head.weight"], grads["model.lm_head.weight"])


def test_a_micro_batch_without_a_score_adds_nothing_with_engine_rewards(tiny_llama):
    policy, groups = policy_of(tiny_llama), make_groups(6, n=1)
    for rollout in groups[0].rollouts:
        rollout.score_logprobs = None
    loss, grads, _ = run_update(policy, groups, config=options(reward_from="engine"))
    assert float(loss) == 0 and all(not grad.any() for grad in grads.values())
