"""Rows whose targets are as probable as a test wants, and three ways to their log-probabilities and gradients."""

from __future__ import annotations

from unittest import mock

import torch

from real_kernels import HeadOptions, triton_head, weighted_logprob

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make(n, d, v, dtype, logits, seed=0):
    """Logits of standard deviation 2 but for the targets' [n], which are as given; coefficients of both signs."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(v, d, generator=g, dtype=torch.float64) * 2 * d**-0.5
    targets = torch.randint(v, (n,), generator=g)
    hidden, chosen = torch.randn(n, d, generator=g, dtype=torch.float64), weight[targets]
    along = (logits - (hidden * chosen).sum(1)) / chosen.square().sum(1)
    hidden += along[:, None] * chosen
    u = torch.randn(n, generator=g)
    hidden, weight = (x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight))
    return hidden, weight, targets.to(DEVICE), u.to(DEVICE)


def exact(hidden, weight, targets, u, temperature=1.0):
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logp = torch.log_softmax(h @ w.t() / temperature, 1).gather(1, targets[:, None])[:, 0]
    return logp.detach(), *torch.autograd.grad((logp * u.double()).sum(), (h, w))


def eager(hidden, weight, targets, u):
    logp = torch.log_softmax((hidden @ weight.t()).float(), 1).gather(1, targets[:, None])[:, 0]
    return logp.detach(), *torch.autograd.grad((logp * u).sum(), (hidden, weight))


def fused(hidden, weight, targets, u, base_rows=1, **options):
    head = HeadOptions(impl="triton", mode="forward", **options)
    with mock.patch.object(triton_head, "BASE_ROWS", base_rows):
        total, logp = weighted_logprob(hidden, weight, targets, u, head=head)
    return logp, *torch.autograd.grad(total, (hidden, weight))


def error(got, want):
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))
