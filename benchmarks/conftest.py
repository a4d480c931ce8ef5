"""What every benchmark starts from."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.machine import PeakMemory, synchronize
from benchmarks.phases import Phases
from real_fast.model.load import load_model, load_tokenizer
from real_fast.score.scale import ScoreScale

ROUNDS = int(os.environ.get("REAL_FAST_BENCH_ROUNDS", "2"))


@dataclass
class Measured:
    """The fastest of the rounds, and the peak memory over all of them, the contender's own construction included."""

    seconds: float
    phases: dict[str, float]
    peak_bytes: int | None
    contender: Any


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """SmolLM2's."""
    return load_tokenizer("smollm2-135m")


@pytest.fixture(scope="session")
def scale(tokenizer: Any) -> ScoreScale:
    """1 to 5."""
    return ScoreScale.from_tokenizer(tokenizer, [1, 2, 3, 4, 5], "So the overall score is ")


@pytest.fixture
def model() -> Any:
    """SmolLM2-135M in fp32, a fresh one for every contender."""
    return load_model("smollm2-135m", torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32)


@pytest.fixture
def measure(benchmark: Any) -> Callable[[Callable[[], Any]], Measured]:
    """Times a contender's ``step(phases)`` by pytest-benchmark."""

    def run(make: Callable[[], Any]) -> Measured:
        rounds: list[tuple[float, dict[str, float]]] = []
        with PeakMemory() as peak:
            contender = make()

            def once() -> None:
                phases = Phases()
                synchronize()
                contender.step(phases)
                synchronize()
                rounds.append((sum(phases.seconds.values()), dict(phases.seconds)))

            benchmark.pedantic(once, rounds=ROUNDS, iterations=1)
        best = min(rounds, key=lambda r: r[0])
        return Measured(min(benchmark.stats.stats.data), best[1], peak.bytes, contender)

    return run
