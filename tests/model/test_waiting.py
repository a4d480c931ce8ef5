"""Frozen weights between the host and a device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from real_fast.model.policy import Policy
from real_fast.model.ref_policy import RefPolicy
from real_fast.model.waiting import Waiting

CPU = torch.device("cpu")


def tensors(module):
    return lambda: [*module.parameters(), *module.buffers()]


def test_weights_are_on_the_device_while_they_are_used_and_are_copied_one_way(monkeypatch):
    module, sent = nn.BatchNorm1d(3).requires_grad_(False), []
    before = [tensor.clone() for tensor in tensors(module)()]

    def to(tensor, device, non_blocking):
        assert non_blocking
        sent.append(tensor.clone())
        return sent[-1]

    waiting = Waiting(tensors(module), CPU, in_place=False)
    home = [tensor.data_ptr() for tensor in tensors(module)()]
    monkeypatch.setattr(torch.Tensor, "to", to)
    for _ in range(2):
        sent.clear()
        waiting.come()
        assert [tensor.data_ptr() for tensor in tensors(module)()] == [tensor.data_ptr() for tensor in sent]
        waiting.leave()
        assert [tensor.data_ptr() for tensor in tensors(module)()] == home and len(sent) == len(home)
        assert all(torch.equal(tensor, old) for tensor, old in zip(tensors(module)(), before, strict=True))


def test_slices_give_their_memory_back_and_keep_their_storage():
    module = nn.Linear(3, 2).requires_grad_(False)
    before, storages = module.weight.clone(), [p.untyped_storage()._cdata for p in module.parameters()]
    waiting = Waiting(lambda: list(module.parameters()), CPU, in_place=True)
    assert all(p.untyped_storage().size() == 0 for p in module.parameters())
    waiting.come()
    assert torch.equal(module.weight, before)
    module.weight.add_(1)  # other weights are read into it
    waiting.keep()
    waiting.leave()
    assert all(p.untyped_storage().size() == 0 for p in module.parameters())
    waiting.come()
    assert torch.equal(module.weight, before + 1)
    assert [p.untyped_storage()._cdata for p in module.parameters()] == storages


@pytest.mark.gpu
def test_the_reference_waits_in_pinned_memory(tiny_llama):
    policy = Policy(tiny_llama().cuda(), torch.bfloat16, "sdpa")
    reference = RefPolicy(policy, 1.0, resident=False)
    assert all(p.device.type == "cpu" and p.is_pinned() for p in reference.policy.parameters())
    with reference._there():
        assert all(p.is_cuda for p in reference.policy.parameters())
    assert all(p.is_pinned() for p in reference.policy.parameters())
