"""The operators under torch.compile and PyTorch's own checks of custom operators."""

from __future__ import annotations

import pytest
import torch

from real_kernels import (
    HeadOptions,
    RealObjective,
    linear_logprob,
    logprob_and_entropy,
    ops,
    real_loss,
    score_logprobs,
    weighted_logprob,
)
from real_kernels.real_op import real_head
from tests.oracles import OPTIONS, make_sequences, pack, records


def make(n=9, d=8, v=40, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=g).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(v, (n,), generator=g)


@pytest.fixture(params=["torch", "triton"])
def impl(request):
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed here (it has no wheel for this platform)")
        if torch.cuda.is_available():
            pytest.skip("CPU tensors need Triton's interpreter, which cannot run beside a GPU's kernels")
    return request.param


def losses(impl):
    """Functions of (hidden, weight, targets) that end in a scalar, for every public function and mode."""
    ids = torch.tensor([3, 1, 12])

    def own(h, w, t):
        return linear_logprob(h, w, t, head=HeadOptions(impl=impl, temperature=0.7)).square().sum()

    def entropy(h, w, t):
        logp, entropy = logprob_and_entropy(h, w, t, head=HeadOptions(impl=impl))
        return (logp * entropy).sum()

    def scores(h, w, t):
        return score_logprobs(h, w, ids, head=HeadOptions(impl=impl)).exp().sum()

    def forward(h, w, t):
        head = HeadOptions(impl=impl, mode="forward", chunk_bytes=700)
        total, logp = weighted_logprob(h, w, t, torch.linspace(-1, 1, 9), head=head)
        return 2 * total + logp.sum()

    def recompute(h, w, t):
        head = HeadOptions(impl=impl, mode="recompute", chunk_bytes=700)
        return weighted_logprob(h, w, t, torch.linspace(-1, 1, 9), head=head)[0]

    return [own, entropy, scores, forward, recompute]


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_is_eager_to_the_bit(impl, which, backend):
    function = losses(impl)[which]
    hidden, weight, targets = make()
    # Something around it, for the compiler to do.
    around = lambda h, w, t: function(h * 2, w, t)  # noqa: E731
    want = around(hidden, weight, targets)
    gradients = torch.autograd.grad(want, (hidden, weight))
    torch.compiler.reset()
    compiled = torch.compile(around, backend=backend, fullgraph=True)
    got = compiled(hidden, weight, targets)
    if backend == "aot_eager":
        assert torch.equal(got, want)
    else:  # Inductor sums the results in another order.
        torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, (hidden, weight)), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if backend == "aot_eager" else 1e-6)


@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("skip", [False, True])
def test_compiled_real_loss(impl, mode, skip):
    sequences, weight, score_ids, values = make_sequences(4, 3, 3, invalid=True)
    packed = pack(sequences)
    dtype = torch.float32 if impl == "triton" else torch.float64
    for name in ("hidden", "score_hidden", "labels"):
        packed[name] = packed[name].detach().to(dtype)
    leaves = [packed["hidden"].requires_grad_(), packed["score_hidden"].requires_grad_()]
    leaves.append(weight.detach().to(dtype).requires_grad_())
    values = values.to(dtype)
    options = records(impl=impl, mode=mode, **OPTIONS)

    def run(hidden, score_hidden, head):
        return real_loss(
            **(packed | {"hidden": hidden, "score_hidden": score_hidden}),
            weight=head,
            score_ids=score_ids,
            score_values=values,
            skip_zero_rows=skip,
            **options,
        )

    want = run(*leaves)
    torch.compiler.reset()
    got = torch.compile(run, backend="aot_eager", fullgraph=True)(*leaves)
    for name, value in vars(want).items():
        torch.testing.assert_close(getattr(got, name), value, rtol=0, atol=0, equal_nan=True, msg=name)
        assert getattr(got, name).requires_grad == (name == "loss"), name
    for a, b in zip(torch.autograd.grad(got.loss, leaves), torch.autograd.grad(want.loss, leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("which", range(5))
def test_autocast_changes_nothing(impl, which):
    """A trainer's autocast must not round float32 logits to 16 bits."""
    function = losses(impl)[which]
    hidden, weight, targets = make()
    want = function(hidden, weight, targets)
    gradients = torch.autograd.grad(want, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        got = function(hidden, weight, targets)
        inside = torch.autograd.grad(got, (hidden, weight))
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(inside, gradients, strict=True))


def test_values_are_checked_in_compiled_code_too():
    hidden, weight, _ = make()
    compiled = torch.compile(linear_logprob, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"targets must lie in 0\.\.39"):
        compiled(hidden, weight, torch.full((9,), 40))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_opcheck(impl, needs):
    """Schema, fake implementation, autograd registration and AOT dispatch, by PyTorch's own checker."""
    hidden, weight, targets = make()
    hidden, weight = (x if need else x.detach() for x, need in zip((hidden, weight), needs, strict=True))
    coefficients, options = torch.linspace(-1, 1, 9), HeadOptions(temperature=0.7)
    torch.library.opcheck(ops.selected_logprobs, (hidden, weight, None, targets, False, True, options.text, impl, 2000))
    torch.library.opcheck(
        ops.weighted_logprob,
        (hidden, weight, None, targets, coefficients, options.text, impl, 2000, *needs, False),
    )
    group = torch.tensor([0, 0, 1])
    head = (hidden, make(3)[0].detach().requires_grad_(needs[0]), weight, None, targets, targets % 3)
    scale = (torch.tensor([3, 1, 12]), torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.5, 4.0]), group, None, None)
    for in_forward in (True, False):
        # Every row is computed: the checker takes NaN, which stands for rows that are not, for a difference.
        rest = (RealObjective().text, options.text, in_forward, impl, 2000, None, None, False, *needs, False)
        torch.library.opcheck(real_head, (*head, *scale, *rest))
