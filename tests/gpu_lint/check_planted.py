"""Planted mistakes are found: tensors of the host, dtypes, layouts, and new places where the host waits.

See test_gpu_lint.py, which runs this file in a process of its own.
"""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from real_fast.attention import varlen
from real_fast.attention.varlen import VarlenAttention
from real_fast.methods.real import Real
from real_fast.model.policy import Policy
from real_fast.types import Batch
from real_kernels import real_op, triton_head
from tests.gpu_lint import operators, steps
from tests.gpu_lint.host_waits import by_place, committed, differences
from tests.gpu_lint.launches import LaunchError
from tests.gpu_lint.pretend import CUDA, cuda_device

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return steps.make_model(tmp_path_factory.mktemp("model"))


PLAIN = "real, sdpa, fp32"  # without Triton's interpreter


@pytest.fixture
def update(model, tmp_path):
    return lambda: steps.run(steps.CASES[PLAIN], model, tmp_path)


def with_change(function, change):
    """The function, after which `change` is called with what it got."""

    def changed(*args, **kwargs):
        result = function(*args, **kwargs)
        change(*args)
        return result

    return changed


def offsets_on_the_host(self, layout, device):
    self.own = self.own._replace(queries=self.own.queries.cpu())


def offsets_in_64_bits(self, layout, device):
    self.own = self.own._replace(keys=self.own.keys.long())


def index_on_the_host(self, layout, device):
    self.shared = self.shared._replace(responses=self.shared.responses.cpu())


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        (VarlenAttention, offsets_on_the_host, "_flash_attention_forward.* gets tensors on the CPU and on cuda:0"),
        (VarlenAttention, offsets_in_64_bits, "must be int32"),
        (VarlenAttention, index_on_the_host, "index_select.* gets tensors on the CPU and on cuda:0"),
    ],
)
def test_a_wrong_tensor_in_the_attention(where, change, message, model, tmp_path):
    """Through Policy alone: loading tries the attention first, and would say that the model is to blame."""
    with patch.object(where, "__init__", with_change(where.__init__, change)), cuda_device():
        layout = varlen.Layout.of_groups([(5, (3, 4))])
        q, k, v = (torch.randn(1, h, layout.tokens, 8, device=CUDA, dtype=torch.bfloat16) for h in (4, 2, 2))
        with pytest.raises(RuntimeError, match=message):
            q.requires_grad_()
            k.requires_grad_()
            VarlenAttention(layout, CUDA)(q, k, v, 0.3, None).sum().backward()


@pytest.mark.parametrize("field", ["input_ids", "targets", "labels", "group"])
def test_a_tensor_of_the_batch_that_stays_on_the_host(field, update):
    to = Batch.to

    def all_but_one(batch, device):
        moved = to(batch, device)
        setattr(moved, field, getattr(batch, field))
        return moved

    with patch.object(Batch, "to", all_but_one), pytest.raises((RuntimeError, ValueError), match=r"on the CPU|on cpu"):
        update()


def test_an_index_of_the_host_is_copied(update):
    """A GPU takes it, and waits."""
    to = Batch.to

    def all_but_one(batch, device):
        return replace(to(batch, device), score_rows=batch.score_rows)

    with patch.object(Batch, "to", all_but_one):
        changed = differences(committed()[PLAIN], by_place(update().waits))
    assert changed == [
        "autograd waits for a copy to the device 2 times, and not 0",
        "real_fast/methods/real.py:Real.fused.<locals>.loss waits for a copy to the device 2 times, and not 0",
    ]


@pytest.mark.parametrize(
    ("mixed", "message"),
    [
        (lambda x, host: x + host, "on the CPU and on cuda:0"),
        (lambda x, host: host[x[:, 0].long() * 0], "on the CPU and on cuda:0"),
        (lambda x, host: x.index_put_((x[:, 0].long() * 0,), host), "on the CPU and on cuda:0"),
        (lambda x, host: torch.cat([x, host]), "on the CPU and on cuda:0"),
        (lambda x, host: x @ x.bfloat16().t(), "dtype"),
        (lambda x, host: x.long() @ x.long().t(), "no CUDA kernel for torch.int64"),
        (lambda x, host: x.numpy(), "can't convert|numpy"),
    ],
)
def test_what_a_gpu_refuses(mixed, message):
    with cuda_device() as mode:
        x = torch.ones(3, 4, device=CUDA)
        with pytest.raises((RuntimeError, TypeError), match=message):
            mixed(x, torch.ones(3, 4))
        assert torch.equal((x * torch.tensor(2.0)).cpu(), 2 * torch.ones(3, 4)) and mode.waits


def test_float64_from_the_engine_in_the_loss(update):
    """As after Batch.labels were made of Python's floats."""
    to = Batch.to

    def wider(batch, device):
        batch.labels = batch.labels.double()
        return to(batch, device)

    def as_it_comes(method, counts, compare):
        return lambda hidden, weight, batch: hidden[batch.score_rows] @ batch.labels[:, None].expand(-1, 32).t()

    with (
        patch.object(Batch, "to", wider),
        patch.object(Real, "fused", as_it_comes),
        pytest.raises(RuntimeError, match="dtype"),
    ):
        update()


def asked(x):
    x.sum().item()


def looked_at(x):
    assert bool((x == x).all())


def counted(x):
    (x[0] > 0).nonzero()


def masked(x):
    x[x[:, 0] > 0]


def taken_home(x):
    x.cpu()


def listed(x):
    x[:1, :1].tolist()


def repeated(x):
    torch.repeat_interleave(torch.ones(2, dtype=torch.int64, device=x.device))


def sent(x):
    torch.tensor([1.0, 2.0], device=x.device)


@pytest.mark.parametrize(
    ("ask", "kind"),
    [
        (asked, "number"),
        (looked_at, "number"),
        (counted, "size"),
        (masked, "size"),
        (repeated, "size"),
        (taken_home, "copy to the host"),
        (listed, "copy to the host"),
        (sent, "copy to the device"),
    ],
)
def test_a_new_wait_is_not_on_the_list(ask, kind, update):
    """It is put down to our innermost function that it was asked from."""
    loss_of = Real.fused

    def waiting(self, counts, compare):
        loss = loss_of(self, counts, compare)

        def asking(hidden, weight, batch):
            ask(hidden.detach())
            return loss(hidden, weight, batch)

        return asking

    with patch.object(Real, "fused", waiting):
        found = by_place(update().waits)
    changed = differences(committed()[PLAIN], found)
    place = "real_fast/methods/policy_gradient.py:PolicyGradient._with_kl_measured.<locals>.measured"
    assert changed == [f"{place} waits for a {kind} 2 times, and not 0"]


def test_a_wait_that_is_no_more_is_told_too(update):
    found = by_place(update().waits)
    found.pop("real_kernels/head.py:real_forward")
    assert differences(committed()[PLAIN], found) == [
        "real_kernels/head.py:real_forward waits for a size 0 times, and not 2"
    ]


def launched(**changes):
    """A launch of the head with arguments changed on their way into the kernel."""
    call = triton_head.TritonHead._launch

    def changed(self, tile, hidden, of, *args, **options):
        for name, change in changes.items():
            if name == "ids":
                of = of._replace(ids=change(of.ids))
            elif name == "hidden":
                hidden = change(hidden)
            elif options.get(name) is not None:
                options[name] = change(options[name])
        return call(self, tile, hidden, of, *args, **options)

    return patch.object(triton_head.TritonHead, "_launch", changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": lambda x: x.int()}, "ids is torch.int32"),
        ({"ids": lambda x: x.cpu()}, "ids is on cpu"),
        ({"selected": lambda x: x.bfloat16()}, "selected is torch.bfloat16"),
        ({"parts": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)}, "tile_max .* must be contiguous"),
        ({"parts": lambda x: x[:, :-1]}, "tile_max .* numbers of it are used"),
        ({"out": lambda x: x[:-1].clone()}, "out is .* rows of"),
        ({"hidden": lambda x: x.double()}, "h is torch.float64"),
    ],
)
def test_a_launch_that_would_read_wrongly(changes, message):
    with launched(**changes), pytest.raises(LaunchError, match=message):
        operators.run(operators.CASES["real"])


def test_counts_on_the_host():
    counts = real_op._counts
    with (
        patch.object(real_op, "_counts", lambda *args: counts(*args).cpu()),
        pytest.raises(LaunchError, match="counts is on cpu"),
    ):
        operators.run(operators.CASES["real"])


def test_operands_of_two_dtypes():
    columns = triton_head.TritonHead.columns
    with (
        patch.object(triton_head.TritonHead, "columns", lambda self, part: columns(self, part).half()),
        pytest.raises(RuntimeError, match=r"a product of .*float16 has no result in .*bfloat16"),
    ):
        operators.run(operators.CASES["real"])


def test_the_loss_is_not_computed_on_the_host(update):
    """A policy that quietly takes the hidden states home would train, slowly."""
    forward = Policy.forward

    def at_home(self, batch, loss):
        return forward(self, batch, lambda hidden, weight, b: loss(hidden.cpu(), weight.cpu(), b))

    with patch.object(Policy, "forward", at_home), pytest.raises(RuntimeError, match=r"index.* on the CPU and on"):
        update()
