"""What an update computes with in place of float32 weights: the same numbers as autocast's, cast once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from real_fast.batching.micro_batches import micro_batches
from real_fast.methods.base import UpdateCounts
from real_fast.model.masters import WorkingWeights
from real_fast.model.policy import Policy
from tests.helpers import make_groups, make_method

HALF, CPU = torch.bfloat16, torch.device("cpu")
BUDGET = 60  # tokens: three micro-batches


class Casts(TorchDispatchMode):
    """Counts casts from float32 to bfloat16 by shape."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and out.dtype == HALF and args[0].dtype == torch.float32:
            self.shapes[tuple(out.shape)] += 1
        return out


def policy_of(model, **work):
    return Policy(model, HALF, "sdpa", WorkingWeights(model, CPU, HALF, **work)).train()


def update(policy):
    """Gradients of two optimiser steps' micro-batches, the weights moving in between."""
    groups, found = make_groups(), []
    loss_of = make_method("real").loss(UpdateCounts.of(groups))
    for _ in range(2):
        policy.zero_grad()
        with policy.working():
            batches = micro_batches(groups, BUDGET, 0, True)
            assert len(batches) > 1
            for batch in batches:
                policy(batch, loss_of).loss.backward()
        found.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad})
        with torch.no_grad():
            for p in policy.parameters():
                p -= 0.01 if p.grad is None else 0.01 * p.grad
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("everything", [False, True])
def test_gradients_are_those_of_autocast_to_the_last_bit(tiny_llama, tied, everything):
    want = update(Policy(tiny_llama(tied=tied, attention_bias=True), HALF, "sdpa").train())
    model = tiny_llama(tied=tied, attention_bias=True)
    own = dict(model.named_parameters())
    found = update(policy_of(model, everything=everything))
    for a, b in zip(want, found, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        assert all(grad.dtype == torch.float32 for grad in b.values())
    after = dict(model.named_parameters())
    assert after.keys() == own.keys() and all(after[name] is own[name] for name in own)  # the masters are back


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_weight_is_cast_once_a_step(tiny_llama, checkpointing):
    def casts(policy):
        if checkpointing:
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with Casts() as counted:
            update(policy)
        return counted.shapes[(64, 32)]  # gate_proj and up_proj of two layers

    assert casts(policy_of(tiny_llama())) == 2 * 4
    assert casts(Policy(tiny_llama(), HALF, "sdpa").train()) >= 2 * 4 * 2  # and autocast once a micro-batch


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("everything", [False, True])
def test_the_head_adds_to_its_float32_gradient(tiny_llama, tied, everything):
    want = update(policy_of(tiny_llama(tied=tied)))
    model = tiny_llama(tied=tied)
    found = update(policy_of(model, everything=everything, fused_head=True))
    for name, grad in want[0].items():
        torch.testing.assert_close(found[0][name], grad, rtol=1e-5, atol=1e-6 * float(grad.abs().max()))
    assert not hasattr(model.lm_head.weight, "main_grad")


def test_frozen_weights_get_no_gradient(tiny_llama):
    model = tiny_llama()
    for name, p in model.named_parameters():
        p.requires_grad_("down_proj" in name)
    want = update(Policy(model, HALF, "sdpa").train())
    model = tiny_llama()
    for name, p in model.named_parameters():
        p.requires_grad_("down_proj" in name)
    found = update(policy_of(model, fused_head=True, everything=True))
    assert want[0].keys() == found[0].keys() and all(torch.equal(want[1][n], found[1][n]) for n in want[1])
    assert {"model." + name for name, p in model.named_parameters() if p.grad is not None} == found[0].keys()


def test_the_weights_are_back_after_an_error(tiny_llama):
    model = tiny_llama()
    own = dict(model.named_parameters())
    with pytest.raises(RuntimeError, match="out of memory"), policy_of(model, fused_head=True).working():
        assert model.model.layers[0].mlp.up_proj.weight.dtype == HALF
        raise RuntimeError("out of memory")
    assert all(p is own[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_everything_is_on_the_device_in_between(tiny_llama, tied):
    """With the device that computes nothing in a GPU's place."""
    model = tiny_llama(tied=tied)
    policy = Policy(model, HALF, None, WorkingWeights(model, torch.device("meta"), HALF, everything=True))
    assert policy.device.type == "meta" and model.device.type == "cpu"
    with policy.working():
        body = [*model.model.parameters(), *model.model.buffers()]
        assert len(body) > 10 and {t.device.type for t in body} == {"meta"}
        assert model.model.embed_tokens.weight.dtype == model.model.norm.weight.dtype == torch.float32
        assert model.model.layers[1].self_attn.q_proj.weight.dtype == HALF
        head = policy.work.head()
        assert head.device.type == "meta" and head.dtype == HALF  # as on a GPU
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}
