"""The head that multiplies in bfloat16 on the CPU, on any CPU: exact logits, gradients no worse than eager's."""

from __future__ import annotations

import pytest
import torch

import real_kernels.head
from real_kernels import HeadOptions, linear_logprob, logprob_and_entropy, score_logprobs, weighted_logprob
from real_kernels.bf16_head import Bf16Head
from real_kernels.head import make_backend
from real_kernels.torch_head import TorchHead


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(real_kernels.head, "has_fast_bf16", lambda: (True, "told so"))
    monkeypatch.setattr(real_kernels.head, "WORTH_BF16", 0)


def make(n=70, d=64, v=1500, bias=False):
    g = torch.Generator().manual_seed(0)
    hidden = (3 * torch.randn(n, d, generator=g)).bfloat16().requires_grad_()
    weight = (torch.randn(v, d, generator=g) / d**0.5).bfloat16().requires_grad_()
    b = torch.randn(v, generator=g).bfloat16().requires_grad_() if bias else None
    return hidden, weight, torch.randint(v, (n,), generator=g), b, torch.randn(n, generator=g)


def logits(hidden, weight, bias=None, softcap=None, temperature=1.0):
    z = torch.nn.functional.linear(hidden, weight, bias)
    z = z if z.dtype == torch.float64 else z.float()
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def both(inputs, ids, u, **options):
    """Log-probabilities and gradients by full logits: in float64, and in bfloat16 as models compute them."""
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        bias = leaves[2] if len(leaves) > 2 else None
        logp = torch.log_softmax(logits(leaves[0], leaves[1], bias, **options), 1).gather(1, ids)
        found.append([logp.detach(), *torch.autograd.grad((logp * u).sum(), leaves)])
    return found


def off(got, want):
    return float((got.double() - want).norm() / want.norm())


def test_it_is_chosen_where_bfloat16_is_fast(monkeypatch):
    weight = torch.zeros(3, 2, dtype=torch.bfloat16)
    assert type(make_backend("torch", weight, None, None, 99)) is Bf16Head
    assert type(make_backend("torch", weight.float(), None, None, 99)) is TorchHead
    monkeypatch.setattr(real_kernels.head, "WORTH_BF16", 7)
    assert type(make_backend("torch", weight, None, None, 99)) is TorchHead
    monkeypatch.setattr(real_kernels.head, "WORTH_BF16", 0)
    monkeypatch.setattr(real_kernels.head, "has_fast_bf16", lambda: (False, "told so"))
    assert type(make_backend("torch", weight, None, None, 99)) is TorchHead


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"softcap": 5.0, "temperature": 1.3}])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ["forward", "recompute", "score"])
@pytest.mark.parametrize("rows", [1000, 19])
def test_exact_logits_and_gradients_no_worse_than_eager(options, biased, kind, rows):
    hidden, weight, targets, bias, u = make(bias=biased)
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    head = HeadOptions(mode=kind if kind == "forward" else "recompute", chunk_bytes=rows * 1500 * 4, **options)
    if kind == "score":
        ids = torch.tensor([[5, 900, 77]]).expand(70, -1)
        u = torch.randn(70, 3, generator=torch.Generator().manual_seed(2))
        logp = score_logprobs(hidden, weight, ids[0], bias=bias, head=head)
        total = (logp * u).sum()
    else:
        ids, u = targets[:, None], u[:, None]
        total, logp = weighted_logprob(hidden, weight, targets, u[:, 0], bias=bias, head=head)
        logp = logp[:, None]
    want, eager = both(inputs, ids, u, **options)
    got = [logp.detach(), *torch.autograd.grad(total, inputs)]
    # 2^-18 of a logit, where eager rounds to 2^-9; score rows are float32.
    assert off(got[0], want[0]) < min(1e-6 if kind == "score" else 4e-6, off(eager[0], want[0]) / 50)
    # The products of several chunks are rounded once more each.
    slack = 1.0 if rows == 1000 else 1.3
    for g, e, w in zip(got[1:], eager[1:], want[1:], strict=True):
        assert g.dtype == torch.bfloat16 and off(g, w) <= slack * off(e, w)


def test_entropy_masked_tokens_and_no_rows():
    hidden, weight, targets, bias, _ = make(bias=True)
    with torch.no_grad():
        bias[1000:] = -torch.inf
    targets = targets % 1000
    logp, entropy = logprob_and_entropy(hidden, weight, targets, bias=bias)
    want = torch.log_softmax((hidden.double() @ weight.double().t() + bias.double())[:, :1000], 1)
    assert off(entropy, -(want.exp() * want).sum(1)) < 1e-5
    assert off(logp, want.gather(1, targets[:, None])[:, 0]) < 1e-5
    gradients = torch.autograd.grad(logp.sum(), (hidden, weight))
    assert all(torch.isfinite(g).all() for g in gradients) and not gradients[1][1000:].any()
    assert linear_logprob(hidden[:0], weight, targets[:0]).shape == (0,)


@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_large_logits(mode):
    """Of ±1e4: finite, and as much better than eager as small ones."""
    hidden, weight, targets, _, u = make()
    hidden = (hidden.detach() * 1e3).requires_grad_()
    total, logp = weighted_logprob(hidden, weight, targets, u, head=HeadOptions(mode=mode))
    want, eager = both([hidden, weight], targets[:, None], u[:, None])
    assert float(want[0].min()) < -1e4 and off(logp[:, None], want[0]) < off(eager[0], want[0]) / 50
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(total, (hidden, weight)))


def test_near_certainty():
    """1 - p of the target by its float32 log-probability, as everywhere in this head."""
    weight = torch.zeros(50, 16)
    weight[7, 0] = 13.0
    weight, hidden = weight.bfloat16().requires_grad_(), torch.eye(1, 16, dtype=torch.bfloat16).requires_grad_()
    total, _ = weighted_logprob(hidden, weight, torch.tensor([7]), torch.ones(1), head=HeadOptions(mode="forward"))
    want = both([hidden, weight], torch.tensor([[7]]), torch.ones(1, 1))[0]
    got = torch.autograd.grad(total, weight)[0]
    torch.testing.assert_close(got.double(), want[2], rtol=2**-7, atol=1e-9)
