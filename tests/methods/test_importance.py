"""Importance weights by exact enumeration: the expected gradient over all rollouts of a sampler, against the true one.

The policy is a small recurrent network over four tokens, so that all its texts of up to three tokens can be written
down. The true gradient is that of sum_x p(x) R(x), by autograd, split into its two parts.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from real_fast.batching.pack import pack_batch
from real_fast.config import Config, ObjectiveConfig, RolloutConfig
from real_fast.methods.base import UpdateCounts
from real_fast.methods.importance import sequence_weights
from real_fast.methods.registry import METHODS
from real_fast.score.scale import ScoreScale
from real_fast.types import Group, Rollout
from real_kernels import reward_parts

END, PHRASE, LABEL, TEMPERATURE = 0, 3, 1.25, 0.8
SCALE = ScoreScale((1.0, 2.0), ("1", "2"), (1, 2), "!", (PHRASE,), 0)
EXACT = {"normalize_std": False, "advantage_clip": 0.0}  # the expected advantage is then the reward's


def texts(longest):
    """All that can be sampled: an end, or the longest length."""
    for length in range(1, longest + 1):
        for body in itertools.product((1, 2), repeat=length - 1):
            yield from ([*body, last] for last in (END, 1, 2) if last == END or length == longest)


def context_of(text):
    return (*(token for token in text if token != END), PHRASE)


class Policy:
    """Logits of the three tokens for every context: behind each unfinished text, and behind its phrase."""

    def __init__(self, seed, longest):
        self.longest = longest
        ends = {context_of(text) for text in texts(longest)}
        self.contexts = sorted({context[:i] for context in ends for i in range(len(context) + 1)})
        self.at = {context: place for place, context in enumerate(self.contexts)}
        generator = torch.Generator().manual_seed(seed)
        self.logits = 0.5 * torch.randn(len(self.at), 3, generator=generator, dtype=torch.float64)
        self.logits[:, END] -= 1

    def moved(self, seed, by):
        other = Policy(seed, self.longest)
        other.logits = self.logits + by * (other.logits - other.logits.mean())
        return other

    def logprobs(self, text):
        """Of a text's tokens."""
        rows = self.logits[[self.at[tuple(text[:i])] for i in range(len(text))]]
        return (rows / TEMPERATURE).log_softmax(1)[range(len(text)), text]

    def scores(self, text):
        """[2], behind the phrase."""
        return self.logits[self.at[context_of(text)]].log_softmax(0)[1:]


def divergence(p, q, drawn):
    """Of the sampler q to the policy p, nats a sequence, a drawn score included."""
    total = mass = 0.0
    for text in texts(p.longest):
        there, gap = q.logprobs(text).sum(), (q.logprobs(text) - p.logprobs(text)).sum()
        if drawn:
            scores, now = (torch.cat([s, torch.log1p(-s.exp().sum())[None]]) for s in (q.scores(text), p.scores(text)))
            gap = gap + (scores.exp() * (scores - now)).sum()
        mass, total = mass + there.exp(), total + there.exp() * gap
    assert math.isclose(mass, 1, rel_tol=1e-12)
    return float(total)


def policy_and_sampler(seed, longest, drawn=False, nats=0.1):
    """Two policies, `nats` apart."""
    p, low, high = Policy(seed, longest), 0.0, 2.0
    for _ in range(12):
        middle = (low + high) / 2
        apart = divergence(p, p.moved(seed + 100, middle), drawn)
        low, high = (low, middle) if apart > nats else (middle, high)
    return p, p.moved(seed + 100, low)


def sampled_by(q, drawn):
    """(rollout, its probability) for every text of the sampler, and every score where one is drawn."""
    found = []
    for text in texts(q.longest):
        logprobs = q.logprobs(text)
        finish = "eos" if text[-1] == END else "length"
        scores = q.scores(text).float().double()  # a batch holds them in float32: these are what is drawn from
        chances = [*scores.exp().tolist(), 1 - float(scores.exp().sum())] if drawn else [1.0]
        for outcome, chance in enumerate(chances):
            rollout = Rollout(text, logprobs.tolist(), list(context_of(text)), 1, finish, scores.tolist(), None)
            rollout.outcome = outcome if drawn else None
            found.append((rollout, chance * float(logprobs.sum().exp())))
    return found


def expected_gradient(p, q, name, *, ahead, further=False, drawn=False, **objective):
    """Of the loss of a group of two rollouts of q, at p: every pair is a group, weighted by its probability.

    Args:
        further: The pairs come to p as to a second iteration on them, whose first was at q.
    """
    config = Config(
        method=name,
        rollout=RolloutConfig(temperature=TEMPERATURE, ahead=ahead),
        objective=ObjectiveConfig(**EXACT, **objective),
    )
    method, counts = METHODS[name](config, None, SCALE), UpdateCounts(2, 2)
    found = sampled_by(q, drawn)
    pairs = list(itertools.product(found, repeat=2))
    groups = [Group(i, [PHRASE], LABEL, [a, b]) for i, ((a, _), (b, _)) in enumerate(pairs)]
    batch = pack_batch(groups)
    places, chance = [], []
    for group, ((_, a), (_, b)) in zip(groups, pairs, strict=True):
        inside = [tuple(r.context_ids[:i]) for r in group.rollouts for i in range(1, len(r.context_ids) + 1)]
        places += [p.at[context] for context in ((), *inside)]
        chance += [a * b] * (len(inside) + 1)
    places, chance = torch.tensor(places), torch.tensor(chance, dtype=torch.float64)[:, None]
    assert len(places) == batch.input_ids.numel()

    def loss(policy, old=None):
        states = policy.logits[places]
        states = states.detach() + chance * (states - states.detach())  # its value, and its gradient times the chance
        return method.loss(counts, old)(states, torch.eye(3, dtype=torch.float64), batch)

    old = loss(q) if further else None
    out = loss(p, old)
    return torch.autograd.grad(out.loss, p.logits)[0], out


def true_gradient(p, what):
    """Minus the gradient of the expected reward: of its two parts, or of all of it where the score is drawn."""
    total = 0.0
    for text in texts(p.longest):
        chance, scores = p.logprobs(text).sum().exp(), p.scores(text)
        label = torch.tensor([LABEL], dtype=torch.float64)
        values = torch.tensor(SCALE.values, dtype=torch.float64)
        reward = reward_parts(scores[None], values, label, reward="paper", lam=1.0).reward[0]
        total = (
            total
            - {
                "exploration": lambda c=chance, r=reward: c * r.detach(),
                "refinement": lambda c=chance, r=reward: c.detach() * r,
                "drawn": lambda c=chance, s=scores: c * s[0].exp(),
            }[what]()
        )
    return torch.autograd.grad(total, p.logits)[0]


CASES = {
    "exploration": ("real", "exploration", {"beta": 0.0}),
    "refinement": ("real", "refinement", {"exploration": False}),
    "a second iteration's refinement": (
        "real",
        "refinement",
        {"exploration": False, "num_iterations": 2, "further": True},
    ),
    "a drawn score": ("binary_rl", "drawn", {"drawn": True}),
}


def bias(p, q, case, **settings):
    name, part, changes = CASES[case]
    found, _ = expected_gradient(p, q, name, **(changes | settings))
    true = true_gradient(p, part)
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize("case", CASES)
def test_weights_make_the_expected_gradient_that_of_the_policy(case):
    """At 0.1 nats a sequence: exact without a cap, at most 3 % off at the usual one, and off by far without weights."""
    drawn, further = CASES[case][2].get("drawn", False), CASES[case][2].get("further", False)
    ahead, cut = int(not further), []
    for seed in range(2 if drawn else 4):
        p, q = policy_and_sampler(seed, longest=3 if drawn else 4, drawn=drawn)
        p.logits.requires_grad_()
        cut.append(bias(p, q, case, ahead=ahead))
        if seed == 0:
            assert bias(p, q, case, ahead=ahead, importance_cap=0.0) < 1e-10
            assert bias(p, q, case, ahead=0, further=False) > 0.1
    # The mean over policies: in so few texts, single ones have more or less of their mass where the cap cuts.
    assert 0 < sum(cut) / len(cut) < (0.06 if drawn else 0.03)


def test_the_weights_are_reported():
    p, q = policy_and_sampler(0, longest=2)
    p.logits.requires_grad_()
    _, out = expected_gradient(p, q, "real", ahead=1, importance_cap=1.1)
    with torch.no_grad():
        ratios = {tuple(t): float((p.logprobs(t) - q.logprobs(t)).sum().exp()) for t in texts(2)}
    want = [
        min(1.1, ratios[tuple(r.sampled_ids)])
        for pair in itertools.product(sampled_by(q, False), repeat=2)
        for r, _ in pair
    ]
    torch.testing.assert_close(out.weights, torch.tensor(want, dtype=torch.float64))
    assert out.computed.all() and not out.weights.requires_grad


def test_a_rollout_without_tokens_has_weight_one():
    logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    sampled = torch.tensor([-1.5, -2.5, -3.0], dtype=torch.float64)
    found = sequence_weights(logp, sampled, torch.tensor([0, 0, 2]), 3, 2.0)
    assert found.tolist() == pytest.approx([2.0, 1.0, 2.0]) and found.dtype == logp.dtype and not found.requires_grad
    found = sequence_weights(logp, sampled, torch.tensor([0, 0, 2]), 3, 0.0)
    assert found.tolist() == pytest.approx([math.exp(1.0), 1.0, math.exp(2.5)])
