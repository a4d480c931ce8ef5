from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from real_kernels import HeadOptions, linear_logprob, score_logprobs, weighted_logprob


def make(n, d, v, dtype=torch.float64, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(n, d, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), generator=g)
    return hidden, weight, targets


def reference(hidden, weight, targets, temperature=1.0):
    logits = hidden.double() @ weight.double().t() / temperature
    return torch.log_softmax(logits, 1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("chunk_bytes", [1, 8 * 13 * 3, 1 << 20])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck(chunk_bytes, temperature):
    hidden, weight, targets = make(5, 4, 13)
    coefficients = torch.randn(5, dtype=torch.float64)
    ids = torch.tensor([3, 1, 12])
    options = {"head": HeadOptions(temperature=temperature, chunk_bytes=chunk_bytes)}
    assert gradcheck(lambda h, w: linear_logprob(h, w, targets, **options), (hidden, weight))
    assert gradcheck(lambda h, w: score_logprobs(h, w, ids, **options), (hidden, weight))
    assert gradcheck(lambda h, w: weighted_logprob(h, w, targets, coefficients, **options)[0], (hidden, weight))


@pytest.mark.parametrize("shape", [(1, 3, 7), (17, 8, 49), (40, 16, 1003)])
def test_float32_against_float64(shape):
    hidden, weight, targets = make(*shape, dtype=torch.float32)
    exact = reference(hidden, weight, targets)
    ours = linear_logprob(hidden, weight, targets, head=HeadOptions(chunk_bytes=5000))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(shape[0])
    got = torch.autograd.grad((ours * upstream).sum(), (hidden, weight))
    want = torch.autograd.grad((exact * upstream.double()).sum(), (hidden, weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_chunks_change_nothing_but_memory():
    hidden, weight, targets = make(33, 8, 101)
    whole = linear_logprob(hidden, weight, targets)
    for rows in (1, 2, 7, 32):
        parts = linear_logprob(hidden, weight, targets, head=HeadOptions(chunk_bytes=rows * 101 * 8))
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_no_worse_than_eager_16_bit(dtype):
    hidden, weight, targets = make(64, 32, 997, dtype=dtype)
    exact = reference(hidden, weight, targets)
    ours = linear_logprob(hidden, weight, targets)
    eager = torch.log_softmax((hidden @ weight.t()).float(), 1).gather(1, targets[:, None])[:, 0]
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() < 1e-4  # float32 logits of the same 16-bit numbers
    assert (ours - exact).abs().max() < (eager - exact).abs().max()
    upstream = torch.randn(64, dtype=torch.float64)
    want = torch.autograd.grad((exact * upstream).sum(), (hidden, weight))
    got = torch.autograd.grad((ours * upstream).sum(), (hidden, weight))
    slow = torch.autograd.grad((eager * upstream).sum(), (hidden, weight))
    wide = [
        (torch.autograd.grad((reference(hidden, weight, targets) * upstream).sum(), x)[0]).double()
        for x in (hidden, weight)
    ]
    for g, s, w, exact_grad in zip(got, slow, want, wide, strict=True):
        assert g.dtype == dtype
        error, eager_error = (g.double() - exact_grad).norm(), (s.double() - exact_grad).norm()
        assert error <= eager_error * 1.05 + 1e-9
        assert error / w.double().norm() < 0.01


@pytest.mark.parametrize("p", [0.9, 0.99, 0.999, 0.99999])
def test_gradient_near_certainty(p):
    """The target's column is all cancellation near p = 1; float32 must keep its digits."""
    v = 50
    hidden = torch.eye(1, 2, dtype=torch.float32).requires_grad_()
    weight = torch.zeros(v, 2)
    weight[7, 0] = float(torch.log(torch.tensor(p / (1 - p) * (v - 1), dtype=torch.float64)))
    weight.requires_grad_()
    targets = torch.tensor([7])
    got = torch.autograd.grad(linear_logprob(hidden, weight, targets).sum(), weight)[0][7, 0].double()
    w64 = weight.detach().double()
    want = -torch.expm1(reference(hidden, w64, targets))[0]
    assert abs(got - want) < 4e-7  # float32 eps is 1.2e-7, and the coefficient is 1
    other = torch.autograd.grad(weighted_logprob(hidden, weight, targets, torch.ones(1))[0], weight)[0][7, 0].double()
    assert abs(other - want) < 4e-7


def test_large_logits_stay_finite_and_zero_rows_work():
    hidden, weight, targets = make(6, 4, 11, dtype=torch.float32, scale=1e4)
    out = linear_logprob(hidden, weight, targets)
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()
    empty = torch.empty(0, 4, requires_grad=True)
    total, logp = weighted_logprob(empty, weight, torch.empty(0, dtype=torch.int64), torch.empty(0))
    total.backward()
    assert total == 0 and logp.shape == (0,) and empty.grad.shape == (0, 4)


def test_frozen_head_costs_no_weight_gradient(monkeypatch):
    import real_kernels.head as module

    products = []

    def spied(original):
        def spy(out, a, b):
            products.append(tuple(out.shape))
            return original(out, a, b)

        return spy

    for name in ("mm_into", "mm_exactly"):
        monkeypatch.setattr(module, name, spied(getattr(module, name)))
    hidden, weight, targets = make(5, 4, 13)
    frozen = weight.detach()
    linear_logprob(hidden, frozen, targets).sum().backward()
    weighted_logprob(hidden, frozen, targets, torch.ones(5, dtype=torch.float64))[0].backward()
    assert products == [(5, 4), (5, 4)]
    products.clear()
    linear_logprob(hidden.detach(), weight, targets).sum().backward()
    weighted_logprob(hidden.detach(), weight, targets, torch.ones(5, dtype=torch.float64))[0].backward()
    assert products == [(13, 4), (13, 4)]
    products.clear()
    with torch.no_grad():
        weighted_logprob(hidden, weight, targets, torch.ones(5, dtype=torch.float64))
    assert products == []


def test_backward_twice_gives_the_same_gradient():
    hidden, weight, targets = make(5, 4, 13)
    total, _ = weighted_logprob(hidden, weight, targets, torch.ones(5, dtype=torch.float64))
    first = torch.autograd.grad(total * 3, weight, retain_graph=True)[0].clone()
    second = torch.autograd.grad(total * 3, weight)[0]
    assert torch.equal(first, second)


def test_tied_weight_gets_both_gradients():
    weight = torch.randn(13, 4, dtype=torch.float64, requires_grad=True)
    ids, targets = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 1])
    linear_logprob(torch.tanh(weight[ids]), weight, targets).sum().backward()
    got = weight.grad.clone()
    weight.grad = None
    reference(torch.tanh(weight[ids]), weight, targets).sum().backward()
    torch.testing.assert_close(got, weight.grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(5)}, "hidden must have two dimensions"),
        ({"hidden": torch.zeros(5, 4, dtype=torch.int64)}, "hidden must be float16"),
        ({"weight": torch.zeros(13, 3)}, "hidden has 4 columns and weight 3"),
        ({"weight": torch.zeros(13, 4, dtype=torch.float64)}, "cast one"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "targets must have shape"),
        ({"targets": torch.zeros(5, dtype=torch.int32)}, "targets must be int64"),
        ({"targets": torch.full((5,), 13)}, r"targets must lie in 0\.\.12, and spans 13\.\.13"),
        ({"targets": torch.full((5,), -100)}, "targets must lie in"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "hidden": torch.zeros(5, 4),
        "weight": torch.zeros(13, 4),
        "targets": torch.zeros(5, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_logprob(**(arguments | change))


def test_wrong_score_ids_are_named():
    hidden, weight = torch.zeros(2, 4), torch.zeros(13, 4)
    with pytest.raises(ValueError, match="different tokens"):
        score_logprobs(hidden, weight, torch.tensor([1, 2, 1]))
    with pytest.raises(ValueError, match=r"score_ids must lie in 0\.\.12"):
        score_logprobs(hidden, weight, torch.tensor([1, 13]))
    with pytest.raises(ValueError, match="detach"):
        weighted_logprob(hidden, weight, torch.zeros(2, dtype=torch.int64), torch.ones(2, requires_grad=True))
