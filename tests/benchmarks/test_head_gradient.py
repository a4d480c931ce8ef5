"""The bytes that are counted, against those counted by hand."""

from __future__ import annotations

import pytest

from benchmarks.head_gradient import MICRO_BATCHES, measure

V, D = 1024, 8


@pytest.mark.parametrize(
    ("copies", "fused", "want"),
    [
        # dW written; added to the gradient from the second micro-batch on.
        (False, False, 4 + 12 * (MICRO_BATCHES - 1) / MICRO_BATCHES),
        # The product reads and writes the sum, which was zeros once.
        (False, True, 8 + 4 / MICRO_BATCHES),
    ],
)
def test_bytes_a_parameter_and_micro_batch(copies, fused, want):
    found = measure(V, D, copies, fused)
    assert found["bytes"] == pytest.approx(want), found["by_operator"]
