"""What an update computes with in place of float32 weights: copies, cast once an optimiser step.

Autocast rounds a weight where it is used and forgets it when its context ends: once a micro-batch, and once more where
activation checkpointing computes a layer again. The copies here are rounded alike and give the same numbers, bit by
bit. Their gradients are added to the float32 weights' own as soon as they are there, and freed.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class WorkingWeights:
    """Stands in for a model's weights from :meth:`take` to :meth:`give_back`; in between them, nothing is held.

    The model's own parameters, the masters, stay what and where they are, and it is their ``grad`` that ends up with
    the gradient. Linear layers get a copy in `dtype`; embeddings, norms and what else a layer does are as they were,
    and so is the head's layer, whose weight the loss takes from :meth:`head`.

    Args:
        model: The model, with float32 weights where they are trained.
        device: Where it computes.
        dtype: Of its linear layers' products, which autocast is on for; None for the weights' own.
        everything: Copy every weight to `device`: the masters are kept in the host's memory.
        fused_head: Let the loss add the head's gradient to the float32 sum itself (``main_grad``, :mod:`real_kernels`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        dtype: torch.dtype | None,
        everything: bool = False,
        fused_head: bool = False,
    ) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.everything, self.fused_head = everything, fused_head
        self._masters: list[tuple[MutableMapping[str, Any], str, torch.Tensor]] = []
        self._head: torch.Tensor | None = None
        self._fused: tuple[torch.Tensor, torch.Tensor] | None = None

    def take(self) -> None:
        """Put the copies into the model; where they are there already, they stay."""
        if self._head is None:
            fused = self.fused_head and torch.is_grad_enabled()
            with torch.no_grad():
                self._take(fused)

    def _take(self, fused: bool) -> None:
        copies: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        head = self.model.get_output_embeddings()
        for module in self.model.modules():
            if module is head:  # whose layer is not called
                continue
            for name, master in list(module._parameters.items()):
                if master is not None:
                    copy = self._copy(master, self._dtype(master, type(module) is nn.Linear), copies)
                    self._put(module._parameters, name, master, copy)
            for name, buffer in list(module._buffers.items()) if self.everything else ():
                if buffer is not None:
                    self._put(module._buffers, name, buffer, buffer.to(self.device))
        # A GPU's float32 products are slow, so the head's are in 16 bits there; a CPU's are in float32.
        dtype = self._dtype(head.weight, self.device.type != "cpu")
        self._head = self._fuse(head.weight, dtype) if fused else self._copy(head.weight, dtype, copies)

    def head(self) -> torch.Tensor | None:
        """[V, D] the head's weight for the loss, None where the copies are not in the model."""
        return self._head

    @torch.no_grad()
    def give_back(self) -> None:
        """Put the masters back, and free the copies; their gradients have been added to the masters' already."""
        for where, name, master in self._masters:
            where[name] = master
        self._masters, head, self._head = [], self._head, None
        if head is not None and hasattr(head, "main_grad"):
            del head.main_grad
        if self._fused is not None:
            (master, gradient), self._fused = self._fused, None
            if gradient is not master.grad:
                _add(master, gradient)

    def _dtype(self, master: torch.Tensor, product: bool) -> torch.dtype:
        lowered = product and self.dtype is not None and master.dtype == torch.float32
        return self.dtype if lowered and self.dtype is not None else master.dtype

    def _put(self, where: MutableMapping[str, Any], name: str, master: torch.Tensor, copy: torch.Tensor) -> None:
        if copy is not master:
            self._masters.append((where, name, master))
            where[name] = copy

    def _copy(
        self, master: torch.Tensor, dtype: torch.dtype, copies: dict[tuple[int, torch.dtype], torch.Tensor]
    ) -> torch.Tensor:
        """The master itself where it can do; one copy for all that share it, a tied head and the embedding."""
        if dtype == master.dtype and not self.everything:
            return master
        key = (id(master), dtype)
        if key not in copies:
            copies[key] = copy = self._cast(master, dtype)
            if master.requires_grad:
                copy.requires_grad_().register_post_accumulate_grad_hook(_hand_over(master))
        return copies[key]

    def _cast(self, master: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # Cast first: half as much goes over the bus. A tensor that is its own copy would be the master itself.
        copy = master.detach().to(dtype).to(self.device)
        return nn.Parameter(copy.clone() if copy.data_ptr() == master.data_ptr() else copy, requires_grad=False)

    def _fuse(self, master: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The head's weight with the float32 tensor that the loss adds its gradient to."""
        same = dtype == master.dtype and not self.everything
        weight = master if same else self._cast(master, dtype)
        if not master.requires_grad:
            return weight
        if master.device.type == self.device.type:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            gradient = master.grad
        else:
            gradient = torch.zeros_like(master, device=self.device)
        weight.requires_grad_()
        weight.main_grad = gradient  # type: ignore[attr-defined]
        self._fused = (master, gradient)
        return weight


def _hand_over(master: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Called when a copy's gradient of a micro-batch is there."""

    def hook(copy: torch.Tensor) -> None:
        assert copy.grad is not None
        gradient, copy.grad = copy.grad, None
        _add(master, gradient)

    return hook


def _add(master: torch.Tensor, gradient: torch.Tensor) -> None:
    gradient = gradient.to(master.device)
    if master.grad is None:
        master.grad = gradient.to(master.dtype)
    else:
        master.grad.add_(gradient)
