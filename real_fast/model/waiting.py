"""Frozen weights that wait in the host's memory, and are on a device while something computes with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class Waiting:
    """The host keeps them for good, since they do not change: they are copied to the device, and dropped there.

    The host's memory is pinned, from which a GPU copies by itself, several times as fast, while the host goes on.

    Args:
        tensors: Gives the parameters and buffers, the same in each call; on the device or on the host.
        device: Where they are computed with.
        in_place: Others keep hold of the tensors' storages, as FSDP2 does of a rank's slices: their memory alone is
            given back, and taken again.
    """

    def __init__(self, tensors: Callable[[], Sequence[torch.Tensor]], device: torch.device, in_place: bool) -> None:
        self.tensors, self.device, self.in_place = tensors, device, in_place
        self.kept: list[torch.Tensor] = []
        for tensor in tensors():  # each is dropped before the next is copied
            self.kept.append(_on_host(self._all_of(tensor)))
            self._drop(tensor, self.kept[-1])

    def come(self) -> None:
        """To the device; what is launched there afterwards sees them."""
        for tensor, kept in zip(self.tensors(), self.kept, strict=True):
            if self.in_place:
                tensor.untyped_storage().resize_(len(kept))
                _bytes_of(tensor).copy_(kept, non_blocking=True)
            else:
                tensor.data = kept.to(self.device, non_blocking=True)

    def leave(self) -> None:
        """The device's memory is given back."""
        for tensor, kept in zip(self.tensors(), self.kept, strict=True):
            self._drop(tensor, kept)

    def keep(self) -> None:
        """Remember what the tensors on the device hold now."""
        for tensor, kept in zip(self.tensors(), self.kept, strict=True):
            kept.copy_(self._all_of(tensor))

    def _all_of(self, tensor: torch.Tensor) -> torch.Tensor:
        return _bytes_of(tensor) if self.in_place else tensor.detach()

    def _drop(self, tensor: torch.Tensor, kept: torch.Tensor) -> None:
        if self.in_place:
            tensor.untyped_storage().resize_(0)
        else:
            tensor.data = kept


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory, pinned where there is a GPU."""
    return torch.empty_like(tensor, device="cpu", pin_memory=torch.cuda.is_available()).copy_(tensor)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
