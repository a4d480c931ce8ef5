"""The fused head: ours beside full logits, torch's own, Liger's, CCE and QuACK; with and without the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.head import NAMES, bench, default_rounds, left_out, shapes, unsuitable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _cases() -> list[Any]:
    return [
        pytest.param(
            shape, name, backward, id=f"{shape.model} N={shape.n} {name} {what}".replace(" ", "-").replace("=", "")
        )
        for shape in shapes(DEVICE)
        for name in NAMES
        for backward, what in ((True, "backward"), (False, "forward"))
    ]


@pytest.mark.parametrize(("shape", "name", "backward"), _cases())
def test_head(shape: Any, name: str, backward: bool, benchmark: Any) -> None:
    """Seconds, peak memory, share of the matmul rate, and the error against float64."""
    if reason := left_out(DEVICE).get(name) or unsuitable(name, shape, DEVICE):
        pytest.skip(reason)

    def repeat(once: Any, rounds: int) -> None:
        benchmark.pedantic(once, rounds=rounds, iterations=1)

    print(bench(name, shape, DEVICE, backward, default_rounds(DEVICE), repeat=repeat))
