"""Fixtures of the trainer's tests."""

from __future__ import annotations

from typing import Any

import pytest

from real_fast.rollout.base import PhraseFinder
from real_fast.scale import ScoreScale


@pytest.fixture(scope="module")
def scale(smollm2_tokenizer: Any) -> ScoreScale:
    """1 to 5 after the usual phrase."""
    return ScoreScale.from_tokenizer(smollm2_tokenizer, [1, 2, 3, 4, 5], "So the overall score is ")


@pytest.fixture(scope="module")
def finder(smollm2_tokenizer: Any, scale: ScoreScale) -> PhraseFinder:
    """Finds that phrase."""
    return PhraseFinder(smollm2_tokenizer, scale)
