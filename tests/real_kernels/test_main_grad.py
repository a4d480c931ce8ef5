"""The head's gradient added to a sum that is there, against autograd's."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from real_kernels import HeadOptions, linear_logprob, real_loss, score_logprobs, weighted_logprob
from tests.oracles import OPTIONS, make_sequences, pack, records

IMPLS = ["torch"] if importlib.util.find_spec("triton") is None or torch.cuda.is_available() else ["torch", "triton"]
V, D, N = 130, 24, 37


def calls(hidden, weight, head):
    """Losses of every function, by name."""
    g = torch.Generator().manual_seed(1)
    targets = torch.randint(weight.shape[0], (len(hidden),), generator=g)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    coefficients = torch.randn(len(hidden), generator=g).to(dtype)
    ids = torch.tensor([3, 5, 8])
    return {
        "weighted": lambda: weighted_logprob(hidden, weight, targets, coefficients, head=head)[0],
        "linear": lambda: (linear_logprob(hidden, weight, targets, head=head) * coefficients).sum(),
        "scores": lambda: score_logprobs(hidden, weight, ids, head=head).exp().sum(),
    }


def make(dtype):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=g, dtype=torch.float64) / 2).to(dtype).requires_grad_()
    return hidden, weight


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("name", ["weighted", "linear", "scores"])
def test_the_sum_gains_what_autograd_would_have_made(impl, dtype, mode, name):
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("the kernels have no float64")
    hidden, weight = make(dtype)
    head = HeadOptions(impl=impl, mode=mode, chunk_bytes=11 * V * 4)  # several chunks
    calls(hidden, weight, head)[name]().backward()
    want, want_hidden, weight.grad, hidden.grad = weight.grad, hidden.grad, None, None
    before = torch.randn(V, D, generator=torch.Generator().manual_seed(2)) * want.abs().max()
    before = before.to(torch.float64 if dtype == torch.float64 else torch.float32)
    weight.main_grad = before.clone()
    calls(hidden, weight, head)[name]().backward()
    assert weight.grad is None and torch.equal(hidden.grad, want_hidden)
    # In 16 bits, what autograd gets has been rounded once more.
    near = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype] * float(want.abs().max())
    torch.testing.assert_close(weight.main_grad - before, want.to(before.dtype), rtol=0, atol=near)


@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_reals_loss_in_float64(mode):
    sequences, weight, score_ids, values = make_sequences(3, 3, 4, invalid=True)
    weight = weight.detach().requires_grad_()

    def loss():
        head = {"chunk_bytes": 23 * 8 * 3, "mode": mode}
        return real_loss(
            weight=weight, score_ids=score_ids, score_values=values, **pack(sequences), **records(**OPTIONS, **head)
        ).loss

    loss().backward()
    want, weight.grad = weight.grad, None
    weight.main_grad = torch.zeros_like(weight)
    loss().backward()
    loss().backward()  # the next micro-batch
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad, 2 * want, rtol=1e-10, atol=1e-12)


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that was made, other than those named."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.numel = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_no_tensor_of_the_weights_size_is_made(mode):
    hidden, weight = make(torch.float32)
    head = HeadOptions(mode=mode, chunk_bytes=11 * V * 4, validate=False)
    weight.main_grad = torch.zeros_like(weight)
    with Largest(weight, weight.main_grad) as seen:
        calls(hidden, weight, head)["weighted"]().backward()
    assert seen.numel < V * D
    del weight.main_grad
    with Largest(weight) as seen:
        calls(hidden, weight, head)["weighted"]().backward()
    assert seen.numel >= V * D


def test_the_forward_pass_speaks_for_one_backward_pass_of_the_loss_itself():
    hidden, weight = make(torch.float32)
    weight.main_grad = torch.zeros_like(weight)
    loss = calls(hidden, weight, HeadOptions(mode="forward"))["weighted"]()
    with pytest.raises(RuntimeError, match=r'gradient here is 2\.0: take HeadOptions\(mode="recompute"\)'):
        (2 * loss).backward(retain_graph=True)
    loss = calls(hidden, weight, HeadOptions(mode="forward"))["weighted"]()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()
    weight.main_grad.zero_()
    (2 * calls(hidden, weight, HeadOptions(mode="recompute"))["weighted"]()).backward()
    twice = weight.main_grad.clone()
    calls(hidden, weight, HeadOptions(mode="recompute"))["weighted"]().backward()
    torch.testing.assert_close(weight.main_grad, 1.5 * twice)


def test_a_sum_that_does_not_fit_is_refused_and_one_that_is_not_needed_left_alone():
    hidden, weight = make(torch.bfloat16)
    weight.main_grad = torch.zeros_like(weight)
    for call in calls(hidden, weight, HeadOptions()).values():
        with pytest.raises(ValueError, match=r"main_grad must be \[130, 24\] in torch.float32"):
            call()
    with torch.no_grad():
        calls(hidden, weight, HeadOptions())["weighted"]()
    weight.requires_grad_(False)
    calls(hidden, weight, HeadOptions())["weighted"]().backward()
    assert not weight.main_grad.any()
