"""Random streams that are functions of a seed and places alone."""

from __future__ import annotations

from random import Random

import numpy as np


def random_stream(seed: int, *places: int) -> Random:
    """A random stream that is a function of (seed, places) alone, the same on every platform and Python version."""
    return Random(" ".join(map(str, (seed, *places))))


def call_seed(seed: int, at: int) -> int:
    """31-bit seed of the call whose first row is `at`: an engine numbers the prompts of each call from 0."""
    return int(np.random.SeedSequence([seed % 2**32, at]).generate_state(1)[0]) >> 1


def step_seed(seed: int, step: int) -> int:
    """Seed of the rollouts of an update: a function of the run's seed and the step, so that a resume repeats them."""
    return seed * 1_000_003 + step
