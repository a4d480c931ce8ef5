"""A cache with room holds what Transformers' own would, whatever is done to it."""

from __future__ import annotations

import torch
from transformers import MistralConfig
from transformers.cache_utils import DynamicCache

from real_fast.rollout import kv_cache
from real_fast.rollout.kv_cache import make_room


def filled(tokens: int = 5, sequences: int = 2) -> DynamicCache:
    cache = DynamicCache()
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        cache.update(*torch.randn(2, sequences, 3, tokens, 4, generator=generator), layer)
    return cache


def test_same_contents_as_without_room(monkeypatch):
    monkeypatch.setattr(kv_cache, "_ROOM", 3)  # grows more than once between two of the changes below
    plain, roomy = filled(), filled()
    make_room(roomy)
    changes = {
        4: lambda cache: cache.batch_repeat_interleave(3),
        9: lambda cache: cache.batch_select_indices(torch.tensor([5, 1, 2])),
        13: lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])),
        14: lambda cache: cache.crop(-2),
        19: lambda cache: cache.batch_select_indices(torch.tensor([0])),
    }
    generator = torch.Generator().manual_seed(1)
    for step in range(24):
        for cache in (plain, roomy):
            changes.get(step, lambda _: None)(cache)
        sequences, new = plain.layers[0].keys.shape[0], 2 if step == 7 else 1
        for layer in range(2):
            states = torch.randn(2, sequences, 3, new, 4, generator=generator)
            for mine, other in zip(roomy.update(*states, layer), plain.update(*states, layer), strict=True):
                assert torch.equal(mine, other)
        assert roomy.get_seq_length() == plain.get_seq_length()
        assert roomy.get_mask_sizes(1, 0) == plain.get_mask_sizes(1, 0)


def test_nothing_is_copied_while_there_is_room():
    cache = filled()
    make_room(cache)
    places = set()
    for _ in range(kv_cache._ROOM):
        keys, values = cache.update(*torch.zeros(2, 2, 3, 1, 4), 0)
        places.add((keys.data_ptr(), values.data_ptr()))
    assert len(places) == 1
    assert keys.shape == (2, 3, 5 + kv_cache._ROOM, 4)


def test_part_of_the_sequences_is_no_longer_the_front_of_the_room():
    """A slice begins where the whole did, and must not be written as if it were the whole."""
    cache = filled()
    make_room(cache)
    cache.update(*torch.zeros(2, 2, 3, 1, 4), 0)
    whole = cache.layers[0].keys
    cache.layers[0].keys, cache.layers[0].values = cache.layers[0].keys[:1], cache.layers[0].values[:1]
    keys, _ = cache.update(*torch.ones(2, 1, 3, 1, 4), 0)
    assert keys.shape == (1, 3, 7, 4)
    assert torch.equal(keys[:, :, :6], whole[:1]) and torch.equal(keys[:, :, 6], torch.ones(1, 3, 4))


def test_layers_with_a_window_stay_as_they_are():
    config = MistralConfig(num_hidden_layers=2, sliding_window=4)
    cache = DynamicCache(config=config)
    for layer in range(2):
        cache.update(*torch.randn(2, 1, 2, 6, 4), layer)
    kinds = [type(layer) for layer in cache.layers]
    make_room(cache)
    assert [type(layer) for layer in cache.layers] == kinds
    assert cache.layers[0].is_sliding
