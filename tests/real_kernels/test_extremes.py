"""Extreme inputs, in both implementations: impossible tokens, equal rewards, nothing at all, NaN, huge logits."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from real_kernels import (
    HeadOptions,
    RealObjective,
    group_advantages,
    linear_logprob,
    logprob_and_entropy,
    real_loss,
    reward_parts,
    score_logprobs,
    weighted_logprob,
)
from real_kernels.rollout_coefficients import rollout_coefficients
from tests.oracles import OPTIONS, make_sequences, naive_advantages, naive_real_loss, pack

if torch.cuda.is_available():
    pytestmark = pytest.mark.gpu
    DEVICE = torch.device("cuda")
else:
    DEVICE = torch.device("cpu")
IMPLS = ["torch", "triton"] if importlib.util.find_spec("triton") else ["torch"]
MODES = ["forward", "recompute"]
V, D = 33, 16
IDS, VALUES = torch.tensor([3, 7, 9], device=DEVICE), torch.tensor([1.0, 2.0, 3.0], device=DEVICE)


def judged(n, m, dtype=torch.float32, scale=1.0, labels=2.0):
    """Arguments of real_loss: N rows over M rollouts in groups of three, label 2."""
    g = torch.Generator().manual_seed(n + 10 * m)
    return {
        "hidden": (scale * torch.randn(n, D, generator=g)).to(DEVICE, dtype).requires_grad_(),
        "weight": torch.randn(V, D, generator=g).to(DEVICE, dtype).requires_grad_(),
        "targets": 10 + torch.arange(n, device=DEVICE) % 20,  # none that a test makes impossible
        "rollout": torch.arange(n, device=DEVICE) % max(m, 1),
        "score_hidden": (scale * torch.randn(m, D, generator=g)).to(DEVICE, dtype).requires_grad_(),
        "score_ids": IDS,
        "score_values": VALUES,
        "labels": torch.full((m,), labels, device=DEVICE),
        "group": torch.arange(m, device=DEVICE) // 3,
    }


def gradients(out, arguments):
    return torch.autograd.grad(out.loss, [arguments[name] for name in ("hidden", "score_hidden", "weight")])


def masked(token, dtype=torch.float32):
    """A bias that makes a token impossible."""
    bias = torch.zeros(V, device=DEVICE, dtype=dtype)
    bias[token] = -torch.inf
    return bias


def coefficients_by(impl):
    if impl == "torch":
        return rollout_coefficients
    from real_kernels import triton_head

    return triton_head.rollout_coefficients


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reward", ["paper", "authors"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_an_impossible_label_weighs_nothing_without_lam(impl, mode, reward, renormalize):
    """0 times -inf: reward and gradient are those of the squared error."""
    arguments = judged(9, 6)
    objective = RealObjective(reward=reward, lam=0.0, normalize_std=False, renormalize=renormalize)
    out = real_loss(**arguments, bias=masked(7), objective=objective, head=HeadOptions(impl=impl, mode=mode))
    logits = (arguments["score_hidden"] @ arguments["weight"].t()).double()
    logits[:, 7] = -torch.inf
    p = torch.softmax(logits[:, IDS] if renormalize else logits, 1)
    y_hat = (p if renormalize else p[:, IDS]) @ VALUES.double()
    want = -((y_hat - 2) ** 2)
    torch.testing.assert_close(out.rewards.double(), want.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.refinement_loss.double(), -want.mean().detach(), rtol=1e-5, atol=1e-5)
    assert all(torch.isfinite(g).all() for g in gradients(out, arguments))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
def test_an_impossible_label_with_lam_is_seen_and_makes_no_nan(impl, mode):
    """A finite loss that no one overlooks, and gradients as without the term."""
    found = []
    for lam in (0.0, 1.0):
        arguments = judged(9, 6)
        out = real_loss(
            **arguments,
            bias=masked(7),
            objective=RealObjective(lam=lam, normalize_std=False, advantage_clip=0.0),
            skip_zero_rows=False,
            head=HeadOptions(impl=impl, mode=mode),
        )
        assert torch.isfinite(out.loss)
        found.append((out, gradients(out, arguments)))
    assert found[1][0].loss > 1e14 and (found[1][0].rewards < -1e14).all()
    assert not found[1][0].advantages.any()  # equally impossible for all of a group
    torch.testing.assert_close(found[0][1][1], found[1][1][1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("baseline", ["leave_one_out", "mean"])
@pytest.mark.parametrize("label", [2.0, 1.5])
def test_one_impossible_label_among_others(impl, size, normalize_std, baseline, label):
    """Advantages go where they go as its probability does: those of any other reward so low."""
    logp = torch.log_softmax(torch.randn(size, 5, generator=torch.Generator().manual_seed(size)), 1)[:, :3]
    logp[0, 1] = -torch.inf
    labels = torch.full((size,), label)
    one, all_of = torch.zeros(size, dtype=torch.int64), torch.ones(size, dtype=torch.bool)
    objective = RealObjective(baseline=baseline, normalize_std=normalize_std)
    tensors = (logp.to(DEVICE), None, VALUES, *(t.to(DEVICE) for t in (labels, one, all_of)))
    found = coefficients_by(impl)(*tensors, torch.tensor([1.0, 1.0], device=DEVICE), objective)
    want = naive_advantages([-1e15, *[0.0] * (size - 1)], baseline, normalize_std, 1.0)
    torch.testing.assert_close(found.advantages.cpu(), torch.tensor(want), rtol=1e-4, atol=1e-4)
    assert all(torch.isfinite(x).all() for x in found)
    # The floor has no slope; what the label shares with a possible neighbour has.
    p = logp[0].double().exp()
    error = float((p * VALUES.cpu().double()).sum()) - label
    slope = -2 * error * VALUES.cpu().double() * p + torch.tensor([2 - label, 0.0, 0.0])
    torch.testing.assert_close(found.dlogp[0].double().cpu(), -slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reward", ["paper", "authors"])
@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_reward_parts_have_the_gradient_of_the_fused_loss_at_an_impossible_label(reward, lam):
    logp = torch.tensor([[-1.0, -torch.inf, -2.0], [-1.0, -0.8, -2.0]], dtype=torch.float64, requires_grad=True)
    labels, values = torch.tensor([2.0, 2.0], dtype=torch.float64), VALUES.double().cpu()
    parts = reward_parts(logp, values, labels, reward=reward, lam=lam)
    (got,) = torch.autograd.grad(parts.refinement.sum(), logp)
    group, valid = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool)
    objective = RealObjective(reward=reward, lam=lam)
    counts = torch.ones(2, dtype=torch.float64)
    want = rollout_coefficients(logp.detach(), None, values, labels, group, valid, counts, objective)
    torch.testing.assert_close(got, -want.dlogp)
    assert all(torch.isfinite(t).all() for t in (parts.reward, *parts.terms, got))


@settings(max_examples=60, deadline=None)
@given(
    # Rewards as they come: float32 that no power of two divides.
    reward=st.floats(-40, 1, width=32),
    size=st.integers(2, 40),
    other=st.integers(0, 3),
    baseline=st.sampled_from(["leave_one_out", "mean"]),
    normalize=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equal_rewards_give_advantages_of_exactly_zero(reward, size, other, baseline, normalize, dtype):
    """A mean of equal numbers may be off by a rounding, which division by a spread of 1e-4 makes 0.006."""
    rewards = torch.cat([torch.full((size,), reward, dtype=dtype), torch.randn(other, dtype=dtype)])
    group = torch.tensor([5] * size + [2] * other)
    found = group_advantages(rewards, group, baseline=baseline, normalize_std=normalize, clip=0.0)
    assert not found[:size].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reward", ["paper", "authors"])
@pytest.mark.parametrize("size", [2, 7, 40])
def test_equal_rollouts_leave_no_rows(impl, reward, size):
    logp = torch.tensor([[-1.1, -0.7, -3.3]]).expand(size, -1).contiguous().to(DEVICE)
    labels, group = torch.full((size,), 2.7, device=DEVICE), torch.zeros(size, dtype=torch.int64, device=DEVICE)
    counts, valid = torch.tensor([3.0, 7.0], device=DEVICE), torch.ones(size, dtype=torch.bool, device=DEVICE)
    for baseline in ("leave_one_out", "mean"):
        for normalize_std in (True, False):
            objective = RealObjective(reward, 0.3, 1.0, baseline, normalize_std, 0.0)
            found = coefficients_by(impl)(logp, None, VALUES, labels, group, valid, counts, objective)
            assert not found.advantages.any() and not found.coefficient.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 3), (0, 1), (4, 1)])
def test_no_rollouts_no_rows_and_groups_of_one(impl, mode, skip, n, m):
    arguments = judged(n, m)
    head = HeadOptions(impl=impl, mode=mode)
    out = real_loss(**arguments, head=head, skip_zero_rows=skip)
    found = gradients(out, arguments)
    assert [g.shape for g in found] == [(n, D), (m, D), (V, D)]
    assert all(torch.isfinite(g).all() for g in found)
    assert out.exploration_loss == 0 and not found[0].any()
    assert out.advantages.shape == out.expected_score.shape == (m,) and out.score_logprobs.shape == (m, 3)
    if m:
        logp = torch.log_softmax(arguments["score_hidden"] @ arguments["weight"].t(), 1)[:, IDS]
        reward = reward_parts(logp, VALUES, arguments["labels"]).reward.mean()
        torch.testing.assert_close(out.loss, -reward, rtol=1e-5, atol=1e-5)
    else:
        assert out.loss == 0 and not any(g.any() for g in found)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
def test_no_valid_rollout(impl, mode):
    arguments = judged(6, 3)
    valid = torch.zeros(3, dtype=torch.bool, device=DEVICE)
    out = real_loss(**arguments, rollout_valid=valid, head=HeadOptions(impl=impl, mode=mode))
    assert out.loss == 0 and not any(g.any() for g in gradients(out, arguments))


def test_rows_without_rollouts_are_refused():
    with pytest.raises(ValueError, match="hidden has 4 rows and score_hidden none"):
        real_loss(**judged(4, 0))


def test_small_functions_take_nothing():
    nothing, ids = torch.empty(0), torch.empty(0, dtype=torch.int64)
    assert group_advantages(nothing, ids).shape == (0,)
    assert reward_parts(torch.empty(0, 3), VALUES.cpu(), nothing).reward.shape == (0,)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_have_no_entropy(impl):
    hidden, weight = torch.empty(0, D, device=DEVICE), torch.ones(V, D, device=DEVICE)
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    for x in logprob_and_entropy(hidden, weight, nothing, head=HeadOptions(impl=impl)):
        assert x.shape == (0,)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_group(impl, bad):
    """Of six rollouts in two groups one has a broken score row: the other group is as without it."""
    for baseline in ("leave_one_out", "mean"):
        arguments = judged(0, 6)
        options = {"objective": RealObjective(baseline=baseline), "head": HeadOptions(impl=impl)}
        want = real_loss(**arguments, **options)
        with torch.no_grad():
            arguments["score_hidden"][1] = bad
        out = real_loss(**arguments, **options)
        assert out.score_logprobs.isnan().any(1).tolist() == [False, True, False, False, False, False]
        assert torch.equal(out.advantages[3:], want.advantages[3:]) and out.advantages[:3].isnan().all()
        assert out.loss.isnan()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_nan_and_no_others(impl, bad):
    arguments = judged(5, 3)
    with torch.no_grad():
        arguments["hidden"][1] = bad
    hidden, weight, targets = (arguments[name] for name in ("hidden", "weight", "targets"))
    head = HeadOptions(impl=impl)
    logp, entropy = logprob_and_entropy(hidden, weight, targets, head=head)
    total, weighted = weighted_logprob(hidden, weight, targets, torch.ones(5, device=DEVICE), head=head)
    for x in (logp, entropy, weighted):
        assert x.isnan().tolist() == [False, True, False, False, False]
    for (dh,) in (torch.autograd.grad(logp.sum(), [hidden]), torch.autograd.grad(total, [hidden])):
        assert dh.isnan().any(1).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("label", [1.0, 1.25, 2.0, 2.999, 3.0])
def test_huge_logits_against_naive(impl, mode, label):
    """Logits of ±1e4: log-probabilities of -1e4 and rewards to match, labels on and between the scores."""
    sequences, weight, score_ids, values = make_sequences(3, 2, 3, d=D, v=V, k=3)
    label = float(values[0]) + (label - 1) / 2 * float(values[-1] - values[0])
    with torch.no_grad():
        for s in sequences:
            s["label"] = float(torch.tensor(label))
            for name in ("hidden", "score_hidden"):
                s[name].copy_((s[name] * 2e3).float())
        weight.copy_(weight.float())
    options = OPTIONS | {"normalize_std": False, "advantage_clip": 0.5}
    want, _ = naive_real_loss(sequences, weight, score_ids.tolist(), values.tolist(), **options)
    narrow = {
        name: (t.detach().float() if t.is_floating_point() else t).to(DEVICE) for name, t in pack(sequences).items()
    }
    names = ("hidden", "score_hidden")
    for name in names:
        narrow[name].requires_grad_()
    head = weight.detach().float().to(DEVICE).requires_grad_()
    out = real_loss(
        weight=head,
        score_ids=score_ids.to(DEVICE),
        score_values=values.float().to(DEVICE),
        **narrow,
        objective=RealObjective(**{k: v for k, v in options.items() if k != "temperature"}),
        head=HeadOptions(impl=impl, mode=mode, temperature=options["temperature"]),
    )
    assert float(out.score_logprobs.min()) < -5e3
    torch.testing.assert_close(out.loss.double().cpu(), want.detach(), rtol=1e-5, atol=1e-3)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.loss, [head, *(narrow[n] for n in names)]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
def test_a_weight_of_zeros_is_a_uniform_distribution(impl, mode):
    arguments = judged(6, 3)
    with torch.no_grad():
        arguments["weight"].zero_()
    out = real_loss(**arguments, head=HeadOptions(impl=impl, mode=mode), skip_zero_rows=False)
    torch.testing.assert_close(out.logprobs, torch.full_like(out.logprobs, 1 / V).log())
    torch.testing.assert_close(out.expected_score, torch.full_like(out.expected_score, 6 / V))
    assert not out.advantages.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_one_score_token(impl):
    """Log-probabilities of one token are fine; a scale of one value is not."""
    arguments = judged(3, 2)
    hidden, weight = arguments["score_hidden"], arguments["weight"]
    head = HeadOptions(impl=impl)
    want = linear_logprob(hidden, weight, torch.tensor([7, 7], device=DEVICE), head=head)
    torch.testing.assert_close(score_logprobs(hidden, weight, IDS[1:2], head=head)[:, 0], want)
    with pytest.raises(ValueError, match="at least two ascending scores"):
        real_loss(**arguments | {"score_ids": IDS[:1], "score_values": VALUES[:1]}, head=head)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["auto", "recompute"])
def test_float16_recomputes_so_that_small_gradients_are_kept(impl, mode):
    """A gradient of 1e-9 is 0 in float16, unless the loss's scale comes before it is rounded."""
    arguments = judged(8, 3, torch.float16, scale=0.1)
    hidden, weight, targets = (arguments[name] for name in ("hidden", "weight", "targets"))
    u = torch.full((8,), 1e-9, device=DEVICE)
    total, _ = weighted_logprob(hidden, weight, targets, u, head=HeadOptions(impl=impl, mode=mode))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    logp = torch.log_softmax(exact[0] @ exact[1].t(), 1).gather(1, targets[:, None])[:, 0]
    want = torch.autograd.grad((logp * u).sum() * 2.0**30, exact)
    for g, w in zip(torch.autograd.grad(total * 2.0**30, (hidden, weight)), want, strict=True):
        assert float((g.double() - w).norm() / w.norm()) < 2e-3
