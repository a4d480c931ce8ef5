"""Gradients of the forward pass handed over as they are, where the caller vouches for an upstream gradient of 1."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from real_kernels import HeadOptions, linear_logprob, real_loss, weighted_logprob
from tests.oracles import OPTIONS, make_sequences, pack, records

IMPLS = ["torch"] if importlib.util.find_spec("triton") is None or torch.cuda.is_available() else ["torch", "triton"]


def make():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 8, generator=g).requires_grad_()
    weight = torch.randn(40, 8, generator=g).requires_grad_()
    return hidden, weight, torch.randint(40, (9,), generator=g)


def weighted(hidden, weight, targets, impl, unit_gradient=True, mode="forward"):
    head = HeadOptions(impl=impl, mode=mode, unit_gradient=unit_gradient, validate=False)
    return weighted_logprob(hidden, weight, targets, torch.linspace(-1, 1, 9), head=head)[0]


@pytest.mark.parametrize("impl", IMPLS)
def test_the_loss_and_a_term_of_it(impl):
    hidden, weight, targets = made = make()
    want = torch.autograd.grad(weighted(*made, impl, False), (hidden, weight))
    got = torch.autograd.grad(weighted(*made, impl), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    other = linear_logprob(hidden, weight, targets, head=HeadOptions(impl=impl, validate=False)).sum()
    want = [
        a + b for a, b in zip(want, torch.autograd.grad(3 * other, (hidden, weight), retain_graph=True), strict=True)
    ]
    got = torch.autograd.grad(weighted(*made, impl) + 3 * other, (hidden, weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_other_upstream_gradient_is_an_error(impl):
    made = make()
    for factor in (2.0, 0.0, float("nan")):
        with pytest.raises(
            RuntimeError, match=r"unit_gradient=True\) is for backward\(\) on the loss itself.*leave it"
        ):
            (factor * weighted(*made, impl)).backward()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(weighted(*made, impl), made[0], create_graph=True)
    # What is computed in the backward pass takes any.
    (2.0 * weighted(*made, impl, mode="recompute")).backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_reals_loss(impl):
    sequences, weight, score_ids, values = make_sequences(4, 3, 3)
    packed = {k: v.detach().float() if v.is_floating_point() else v for k, v in pack(sequences).items()}
    weight = weight.detach().float().requires_grad_()

    def loss(unit_gradient):
        options = records(impl=impl, mode="forward", unit_gradient=unit_gradient, **OPTIONS)
        return real_loss(weight=weight, score_ids=score_ids, score_values=values.float(), **packed, **options).loss

    want = torch.autograd.grad(loss(False), weight)[0]
    assert torch.equal(torch.autograd.grad(loss(True), weight)[0], want)
    with pytest.raises(RuntimeError, match="unit_gradient"):
        (loss(True) / 2).backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(impl, backend):
    """The same bits, and the same mistake found, by the compiled code itself."""
    made = make()
    torch.compiler.reset()
    compiled = torch.compile(lambda h, w, t: weighted(h * 2, w, t, impl), backend=backend, fullgraph=True)
    want = torch.autograd.grad(weighted(made[0] * 2, *made[1:], impl), made[:2])
    for a, b in zip(torch.autograd.grad(compiled(*made), made[:2]), want, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="unit_gradient"):
        (2 * compiled(*made)).backward()
