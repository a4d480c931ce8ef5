"""KL and clipped ratio: the formulas by hand, and the whole objective against full logits, one sequence at a time."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

from real_fast.batching.micro_batches import micro_batches
from real_fast.config import ObjectiveConfig
from real_fast.methods.base import UpdateCounts
from real_fast.methods.policy_gradient import clipped_surrogate, k3, weigh
from real_fast.model.policy import Policy
from real_fast.model.ref_policy import RefPolicy
from real_fast.types import JudgeRow, Rollout
from tests.helpers import SCALE, make_groups, make_method
from tests.oracles import interpolate, naive_advantages

TEMPERATURE = 0.8


def judged_groups(missing=True):
    groups = make_groups(3, n=4, k=4, missing=missing)
    for group in groups:
        for i, rollout in enumerate(group.rollouts):
            if rollout.has_score:
                rollout.outcome = (i + group.index) % 4  # 3: off the scale
    return groups


def moved(policy, by, seed):
    """A copy of the policy with other weights."""
    other = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return other


def run(policy, groups, make, budget=60, held=None):
    """Loss, gradients and outputs over micro-batches; `make` builds the loss of the i-th, `held` are a reference's."""
    policy.zero_grad()
    outputs = []
    for i, batch in enumerate(micro_batches(groups, budget, 0, True)):
        batch.ref_logprobs = None if held is None else held[i]
        out = policy(batch, make(i))
        out.loss.backward()
        outputs.append(out)
    loss = sum(out.loss.detach() for out in outputs)
    return loss, {name: p.grad.clone() for name, p in policy.named_parameters()}, outputs


def log_probabilities(policy, groups):
    """Of each rollout: its sampled tokens' at the sampling temperature, a list, and the scores' at 1, [K]."""
    found = []
    for group in groups:
        for r in group.rollouts:
            logits = policy.model(torch.tensor([[*group.prompt_ids, *r.context_ids]])).logits[0]
            start = len(group.prompt_ids) - 1
            text = [(logits[start + t] / TEMPERATURE).log_softmax(-1)[token] for t, token in enumerate(r.sampled_ids)]
            found.append((text, logits[-1].log_softmax(-1)[list(SCALE.score_ids)]))
    return found


def oracle(policy, first, reference, groups, method, config):
    """The objective of an iteration after the first, in plain autograd."""
    with torch.no_grad():
        before, held = log_probabilities(first, groups), log_probabilities(reference, groups)
    now = log_probabilities(policy, groups)
    pairs = [(group, r) for group in groups for r in group.rollouts]

    def reward(label, scores, outcome):
        if method == "binary_rl":
            distances = [abs(value - label) for value in SCALE.values]
            return torch.tensor(float(outcome < 3 and distances[outcome] == min(distances)))
        y_hat = sum(v * p for v, p in zip(SCALE.values, scores.exp(), strict=True))
        return -((y_hat - label) ** 2) + config.lam * interpolate(SCALE.values, scores, label)

    def drawn(scores, outcome):
        return torch.log(1 - scores.exp().sum()) if outcome == 3 else scores[outcome]

    def clipped(a, new, old):
        ratio = torch.exp(new - old)
        if a > 0:
            return a * (ratio if ratio < 1 + config.epsilon else 1 + config.epsilon)
        return a * (ratio if ratio > 1 - config.epsilon else 1 - config.epsilon)

    valid = sum(r.has_score for _, r in pairs)
    tokens = sum(len(r.sampled_ids) for _, r in pairs if r.has_score)
    share = valid if config.loss_norm == "sequence_sum" else tokens
    loss, cut = torch.zeros((), dtype=torch.float64), 0
    for group in groups:
        members = [i for i, (g, r) in enumerate(pairs) if g is group and r.has_score]
        rewards = [float(reward(group.label, before[i][1], pairs[i][1].outcome)) for i in members]
        advantages = naive_advantages(rewards, config.baseline, config.normalize_std, config.advantage_clip)
        for i, a in zip(members, advantages, strict=True):
            for new, old, far in zip(now[i][0], before[i][0], held[i][0], strict=True):
                loss = loss - clipped(a, new, old) / share
                cut += not math.isclose(float(clipped(a, new, old)), a * math.exp(float(new - old)), rel_tol=1e-12)
                loss = loss + config.kl_coef * (torch.exp(far - new) - (far - new) - 1) / share
            outcome = pairs[i][1].outcome
            if method == "binary_rl":
                loss = loss - clipped(a, drawn(now[i][1], outcome), drawn(before[i][1], outcome)) / share
            else:
                ratio = math.exp(sum(map(float, map(torch.detach, now[i][0]))) - sum(map(float, before[i][0])))
                weight = min(ratio, config.importance_cap or math.inf)
                loss = loss - config.beta * weight * reward(group.label, now[i][1], outcome) / valid
    policy.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in policy.named_parameters()}, cut


def references(policy, groups, budget=60):
    return RefPolicy(policy, TEMPERATURE, resident=True).logprobs(micro_batches(groups, budget, 0, True))


def assert_same(grads, want):
    # Llama's norms and rotary embeddings compute in float32 even in a float64 model.
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want[name], rtol=1e-5, atol=1e-7)


def test_k3_by_hand():
    logp = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.0, -1.0, -3.0], dtype=torch.float64)
    found = k3(logp, reference)
    want = [0.0, math.exp(1.0) - 2.0, math.exp(-2.5) + 1.5]  # exp(d) - 1 - d for d = 0, 1, -2.5
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64))
    found.sum().backward()
    # d k3 / d logp = 1 - exp(d): a token that the policy likes better than the reference becomes less likely.
    want = [0.0, 1 - math.exp(1.0), 1 - math.exp(-2.5)]
    torch.testing.assert_close(logp.grad, torch.tensor(want, dtype=torch.float64))


def test_a_weight_of_zero_makes_zero_of_an_impossible_token():
    """A drawn score that the model holds for impossible, in a group of equal rewards."""
    logp = torch.tensor([-math.inf, -1.5], dtype=torch.float64, requires_grad=True)
    found = weigh(torch.tensor([0.0, 2.0], dtype=torch.float64), logp)
    found.sum().backward()
    assert found.tolist() == [0.0, -3.0] and logp.grad.tolist() == [0.0, 2.0]


def test_k3_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    divergence = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * k3(policy, reference)).sum(), divergence)
    assert float(divergence) > 0.1 and bool((k3(policy, reference) >= 0).all())


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "clipped"),
    [
        (1.0, 2.0, 2.0, False),
        (1.1, 2.0, 2.2, False),
        (1.5, 2.0, 2.4, True),  # gone far enough up
        (1.5, -2.0, -3.0, False),  # the wrong way: it must come back
        (0.5, -2.0, -1.6, True),  # gone far enough down
        (0.5, 2.0, 1.0, False),
        (1.5, 0.0, 0.0, False),
    ],
)
def test_the_clip_by_hand(ratio, advantage, value, clipped):
    old = torch.tensor([-1.3], dtype=torch.float64)
    logp = (old + math.log(ratio)).requires_grad_()
    a = torch.tensor([advantage], dtype=torch.float64)
    found = clipped_surrogate(logp, old, a, 0.2)
    found.value.sum().backward()
    assert float(found.value.detach()) == pytest.approx(value) and bool(found.clipped) == clipped
    assert float(found.ratio) == pytest.approx(ratio)
    assert float(logp.grad) == pytest.approx(0.0 if clipped else ratio * advantage)  # d ratio / d logp = ratio


@pytest.mark.parametrize("method", ["real", "binary_rl"])
@pytest.mark.parametrize(
    "changes",
    [
        {"importance_cap": 1.05},
        {"loss_norm": "token_mean", "normalize_std": False, "advantage_clip": 0.0, "importance_cap": 0.0},
    ],
)
def test_later_iteration_against_full_logits(tiny_llama, method, changes):
    """Old, new and reference weights all differ; a third of the tokens or so are clipped."""
    policy, groups = Policy(tiny_llama().double(), attention="sdpa"), judged_groups()
    config = ObjectiveConfig(kl_coef=0.3, num_iterations=2, epsilon=0.03, **changes)
    first_policy, reference_policy = moved(policy, 0.02, 1), moved(policy, 0.03, 2)
    totals, held = UpdateCounts.of(groups), references(reference_policy, groups)

    own = make_method(method, config, TEMPERATURE)
    _, _, first = run(first_policy, groups, lambda i: own.loss(totals), held=held)
    loss, grads, outputs = run(policy, groups, lambda i: own.loss(totals, first[i]), held=held)
    want, want_grads, cut = oracle(policy, first_policy, reference_policy, groups, method, config)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-7)
    assert_same(grads, want_grads)
    assert sum(int(out.clipped.sum()) for out in outputs) == cut > 10
    if method == "real":
        weights = torch.cat([out.weights for out in outputs])
        assert float(weights.min()) < 0.95 and float(weights.max()) > 1.04
    parts = sum(sum(out.parts.values()) for out in outputs)
    torch.testing.assert_close(parts, loss)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reward": "authors", "beta": 0.1, "loss_norm": "token_mean"},
        {"renormalize": True, "lam": 0.3, "baseline": "mean"},
        {"exploration": False},
        {"reward_from": "engine", "normalize_std": False},
    ],
)
@pytest.mark.parametrize("method", ["real", "binary_rl"])
@pytest.mark.parametrize("compare", [False, True])
def test_first_iteration_has_the_fused_objectives_gradient(tiny_llama, method, changes, compare):
    policy, groups = Policy(tiny_llama().double(), attention="sdpa"), judged_groups()
    groups[0].rollouts[0].score_logprobs = [-0.1, -4.0, -5.0]
    config, totals = ObjectiveConfig(num_iterations=2, **changes), UpdateCounts.of(groups)
    own = make_method(method, config, TEMPERATURE)
    fused, ours = own.fused(totals, compare), own.loss(totals, None, compare)
    want, want_grads, fused_out = run(policy, groups, lambda i: fused)
    loss, grads, out = run(policy, groups, lambda i: ours)
    torch.testing.assert_close(loss, want)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[name], rtol=1e-9, atol=1e-12)
    batches = micro_batches(groups, 60, 0, True)
    for a, b, batch in zip(out, fused_out, batches, strict=True):
        for name in ("rewards", "advantages", "expected_score", "score_logprobs"):
            torch.testing.assert_close(getattr(a, name)[batch.rollout_valid], getattr(b, name)[batch.rollout_valid])
        # The weight of a further iteration's refinement needs rows that this one has no use for.
        every = batch.rollout_valid[batch.rollout]
        assert torch.equal(a.computed, every if method == "real" else b.computed)
        torch.testing.assert_close(a.logprobs[b.computed], b.logprobs[b.computed])
        assert a.parts.keys() == b.parts.keys()
        assert all(torch.allclose(a.parts[name], b.parts[name]) for name in a.parts)
    # With the same weights, the second iteration's ratio is 1 and its gradient the first one's.
    again = run(policy, groups, lambda i: own.loss(totals, out[i]))
    for name, grad in again[1].items():
        torch.testing.assert_close(grad, want_grads[name], rtol=1e-9, atol=1e-12)
    assert all(bool((o.ratio == 1).all()) and not o.clipped.any() for o in again[2])


def test_the_kl_pulls_towards_the_reference(tiny_llama):
    """Of all that is sampled, for REAL's two halves too: refinement alone has no rows of its own."""
    policy, groups = Policy(tiny_llama().double(), attention="sdpa"), judged_groups()
    held, totals = references(moved(policy, 0.05, 1), groups), UpdateCounts.of(groups)
    config = ObjectiveConfig(kl_coef=1e3, exploration=False)
    own = make_method("real", config, TEMPERATURE)
    optimizer, found = torch.optim.SGD(policy.parameters(), lr=1e-5), []
    for _ in range(8):
        _, _, out = run(policy, groups, lambda i: own.loss(totals), held=held)
        found.append(float(torch.cat([o.kl for o in out]).mean()))
        optimizer.step()
    assert all(b < a for a, b in itertools.pairwise(found)) and found[-1] < 0.8 * found[0]


@pytest.mark.parametrize("method", ["real", "binary_rl"])
@pytest.mark.parametrize("exploration", [True, False])
def test_measuring_the_kl_changes_nothing_to_the_last_bit(tiny_llama, method, exploration):
    policy, groups = Policy(tiny_llama(), attention="sdpa"), judged_groups()
    for group in groups[:2]:  # all advantages 0: rows that the loss leaves out
        for r in group.rollouts:
            r.outcome = None if r.outcome is None else 3
    config, totals = ObjectiveConfig(exploration=exploration), UpdateCounts.of(groups)
    own = make_method(method, config, TEMPERATURE)
    other = moved(policy, 0.02, 1)
    held = references(other, groups)
    loss, grads, plain = run(policy, groups, lambda i: own.loss(totals))
    again, same, measured = run(policy, groups, lambda i: own.loss(totals), held=held)
    assert torch.equal(loss, again) and all(torch.equal(grads[name], same[name]) for name in grads)
    assert all(torch.equal(a.computed, b.computed) for a, b in zip(plain, measured, strict=True))
    with torch.no_grad():
        ours, theirs = log_probabilities(policy, groups), log_probabilities(other, groups)
    pairs = [r for group in groups for r in group.rollouts]
    want = [
        math.exp(b - a) - 1 - (b - a)
        for r, (now, _), (far, _) in zip(pairs, ours, theirs, strict=True)
        if r.has_score
        for a, b in zip(map(float, now), map(float, far), strict=True)
    ]
    found = torch.cat([o.kl for o in measured])
    assert len(found) == len(want) and float(found.mean()) == pytest.approx(sum(want) / len(want), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "objective", "compare", "read"),
    [
        ("real", {}, False, False),
        ("real", {}, True, True),
        ("real", {"reward_from": "engine"}, False, True),
        ("binary_rl", {}, False, True),
    ],
)
def test_the_engine_is_asked_for_scores_where_they_are_read(name, objective, compare, read):
    asked = []

    class Engine:
        name, vocabulary = "fixed", 300

        def generate(self, prompts, params):
            asked.append(params)
            return [[Rollout([7], [-1.0], [7, 60, 61], 2, "phrase", [-2.0] * 3, None)] * params.n for _ in prompts]

    row = JudgeRow("1", "1", "", "", "", "", 2.0, [], [], [1, 2])
    method = make_method(name, ObjectiveConfig(**objective))
    method.groups([row], 0, 3, Engine(), compare)
    assert asked[0].scores is read


def test_scores_that_were_not_read_change_nothing(tiny_llama):
    policy = Policy(tiny_llama().double(), attention="sdpa")
    groups = make_groups(missing=True)
    method, counts = make_method("real"), UpdateCounts.of(groups)
    want = run(policy, groups, lambda _: method.loss(counts))
    for group in groups:
        for rollout in group.rollouts:
            rollout.unread, rollout.score_logprobs = rollout.has_score, None
    assert UpdateCounts.of(groups) == counts
    found = run(policy, groups, lambda _: method.loss(counts))
    assert found[0] == want[0] and all(torch.equal(found[1][n], want[1][n]) for n in want[1])
