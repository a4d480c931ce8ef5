"""A head that is more than its weight is refused, by the policy too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from real_fast.batching.pack import pad_batch
from real_fast.errors import ModelError
from real_fast.model.head import plain_head
from real_fast.model.policy import Policy
from tests.helpers import make_groups


class Adapter(nn.Module):
    """As PEFT's layers are: a `weight` of its own name, which is the base layer's alone."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight


class Quantised(nn.Linear):
    """As bitsandbytes' layers are: a linear layer that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda: Adapter(nn.Linear(32, 384, bias=False)), "Adapter.*leave lm_head out of the adapter's target_modules"),
        (lambda: Quantised(32, 384, bias=False), "Quantised"),
        (lambda: nn.Linear(32, 384), "bias in its head"),
        (lambda: nn.Linear(32, 384, bias=False).to(torch.float8_e4m3fn), "quantised head"),
    ],
)
def test_heads_that_are_more_than_their_weight(tiny_llama, head, message):
    model = tiny_llama()
    policy = Policy(model)
    model.lm_head = head()
    batch = pad_batch(make_groups(), 0)
    for refuses in (lambda: plain_head(model), lambda: Policy(model), lambda: policy(batch, lambda *_: None)):
        with pytest.raises(ModelError, match=message):
            refuses()


@pytest.mark.parametrize(
    ("key", "value"),
    [("final_logit_softcapping", 30.0), ("logit_scale", 0.0625), ("logits_scaling", 8.0), ("output_multiplier", 2.0)],
)
def test_the_policy_refuses_changed_logits(tiny_llama, key, value):
    """Gemma 2, Cohere, Granite, and models after muP."""
    model = tiny_llama()
    setattr(model.config, key, value)
    with pytest.raises(ModelError, match=f"{key} = {value}"):
        Policy(model)


def test_a_parametrised_head_is_its_weight(tiny_llama):
    model = tiny_llama()
    nn.utils.parametrizations.weight_norm(model.lm_head)
    assert plain_head(model) is model.lm_head
