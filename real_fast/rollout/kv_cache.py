"""Room behind the cached keys and values, so that a decoding step writes one token instead of copying all before it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

_ROOM = 64  # tokens: one copy in as many steps, and no more than these are held in vain


def make_room(cache: Cache) -> None:
    """Let the layers of `cache` that keep all their tokens grow in place; those with a window or a state stay.

    Keys and values are the same as without it, [sequences, Hkv, tokens, Dh], but no longer contiguous.
    """
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[place] = _GrowingLayer(layer)


class _GrowingLayer(DynamicLayer):
    """A layer whose keys and values are the front of larger tensors."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        vars(self).update(vars(layer))
        assert self.keys is not None and self.values is not None
        self._rooms = self.keys, self.values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens behind the others. Shapes as in :class:`DynamicLayer`."""
        assert self.keys is not None and self.values is not None
        before = self.keys.shape[-2]
        after = before + key_states.shape[-2]
        rooms = [
            _with_room(room, states, after) for room, states in zip(self._rooms, (self.keys, self.values), strict=True)
        ]
        for room, states in zip(rooms, (key_states, value_states), strict=True):
            room[..., before:after, :] = states
        self._rooms = rooms[0], rooms[1]
        self.keys, self.values = (room[..., :after, :] for room in rooms)
        return self.keys, self.values


def _with_room(room: torch.Tensor, states: torch.Tensor, tokens: int) -> torch.Tensor:
    """`room` if it begins with `states` (which other methods may have replaced) and holds `tokens`, or a larger one."""
    same = room.data_ptr() == states.data_ptr() and room.shape[:-2] == states.shape[:-2]
    if same and tokens <= room.shape[-2]:
        return room
    larger = states.new_empty(*states.shape[:-2], tokens + _ROOM, states.shape[-1])
    larger[..., : states.shape[-2], :] = states
    return larger
