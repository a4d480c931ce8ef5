"""Python's numbers in one tensor."""

from __future__ import annotations

import pytest
import torch

from real_fast.utils.flat import flat


def test_numbers_of_all_lists_behind_one_another():
    assert flat([[1, 2], (), (3,), range(2)]).tolist() == [1, 2, 3, 0, 1]
    odd = [float("nan"), float("-inf"), 0.1, -0.0, 1]
    found, want = flat([odd, odd[:2]], torch.float64), torch.tensor([*odd, *odd[:2]], dtype=torch.float64)
    assert found.dtype == torch.float64 and torch.equal(found.view(torch.int64), want.view(torch.int64))
    for dtype in (torch.int64, torch.float64):
        assert flat([], dtype).shape == flat([[]], dtype).shape == (0,) and flat([], dtype).dtype == dtype
    for wrong in ([1.5], ["1"], [None]):
        with pytest.raises(TypeError):
            flat([wrong])


def test_it_is_the_tensors_own_memory():
    numbers = [1, 2]
    found = flat([numbers])
    found += 1
    assert found.tolist() == [2, 3] and numbers == [1, 2]
