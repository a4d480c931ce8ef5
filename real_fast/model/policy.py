"""The policy: a Transformers model whose training loss is computed inside ``forward``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from real_fast.attention.interface import Backend, prepare, prepared_mask
from real_fast.attention.support import check_span, enable
from real_fast.model.head import plain_head
from real_fast.model.load import body_of
from real_fast.model.masters import WorkingWeights
from real_fast.types import Batch

T = TypeVar("T")


class FasterLayers(Protocol):
    """Other code for a model's layers, in effect between :meth:`on` and :meth:`off`."""

    name: str

    def on(self) -> None:
        """Run the other code. Where it runs already, nothing changes."""

    def off(self) -> None:
        """Run the model's own code."""

    def of(self, model: PreTrainedModel) -> FasterLayers:
        """The same for another model of this kind."""


@dataclass(frozen=True)
class Spread:
    """How a policy is spread over ranks, see :func:`real_fast.model.sharded.spread`."""

    mesh: DeviceMesh
    dtype: torch.dtype | None
    root_dtype: torch.dtype | None


class Policy(nn.Module):
    """The model being trained.

    The loss runs inside ``forward``, so that whatever wraps the module (FSDP2) sees one call and gathers a sharded head
    where it is used.

    Args:
        model: A causal language model with a plain linear head.
        autocast_dtype: Dtype of the body's matrix products; None for the weights' own.
        attention: Backend for packed rows with shared prompts; None for padded batches alone.
        work: What an update computes with in place of the model's weights; None for the weights themselves, which
            autocast then casts in every forward pass.
        faster: Other code for the layers while an update lasts; None for the model's own.
        tried: The model's kind has been tried with `attention` (:mod:`real_fast.model.sharded`), and is not again.

    Raises:
        ModelError: Logits that are more than the head's weight times hidden states.
        SharedPromptError: A model that cannot share prompts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        autocast_dtype: torch.dtype | None = None,
        attention: Backend | None = None,
        work: WorkingWeights | None = None,
        faster: FasterLayers | None = None,
        tried: bool = False,
    ) -> None:
        super().__init__()
        plain_head(model)
        self.model = model
        self.autocast_dtype = autocast_dtype
        self.attention = attention
        self.work = work
        self.faster = faster
        self.spread: Spread | None = None
        if attention is not None:
            enable(model, attention, self.working, tried)

    @property
    def device(self) -> torch.device:
        """Where it computes; the model's weights may be kept elsewhere."""
        return self.model.device if self.work is None else self.work.device

    @contextmanager
    def working(self) -> Iterator[None]:
        """In here the model computes with :class:`WorkingWeights`, where it has any."""
        self.begin_step()
        try:
            yield
        finally:
            self.end_step()

    def begin_step(self) -> None:
        """Before the first forward pass of an optimiser step: cast the weights."""
        if self.work is not None:
            self.work.take()

    def end_step(self) -> None:
        """Behind its last backward pass: the model has its own weights and layers again, and their gradients."""
        if self.faster is not None:
            self.faster.off()
        if self.work is not None:
            self.work.give_back()

    def forward(self, batch: Batch, loss: Callable[[torch.Tensor, torch.Tensor, Batch], T]) -> T:
        """Run the body once and hand ``loss`` the hidden states, flattened to [B * T, D], and the head's weight."""
        inputs: dict[str, Any] = {"attention_mask": batch.attention_mask}
        if batch.layout is not None:
            if self.attention is None:
                raise ValueError("a packed batch needs Policy(..., attention=...)")
            device = batch.input_ids.device
            check_span(self.model, batch.layout.longest)
            inputs = {
                "attention_mask": prepared_mask(device),
                "shared_prompt": prepare(batch.layout, self.attention, device),
            }
        if self.faster is not None:
            self.faster.on()  # to the step's end, since the backward pass may compute layers again
        try:
            with self.autocast():
                hidden = body_of(self.model)(
                    input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **inputs
                ).last_hidden_state
        finally:
            if self.faster is not None and not torch.is_grad_enabled():
                self.faster.off()
        # Looked at in each call, as an adapter may have come to the head since.
        weight = plain_head(self.model).weight
        if self.work is not None and (copy := self.work.head()) is not None:
            weight = copy
        # A GPU's float32 matrix products are slow; 16-bit operands with float32 accumulation are what the head wants.
        if self.autocast_dtype is not None and weight.is_cuda:
            weight = weight.to(self.autocast_dtype)
        hidden = hidden.to(weight.dtype)
        return loss(hidden.flatten(0, 1), weight, batch)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that the body runs in."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)
