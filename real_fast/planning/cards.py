"""GPUs as their makers publish them, and what an update should take on one: arithmetic, nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from real_fast.errors import ConfigError

# Shares of the published peaks that a plan counts on.
COMPUTE, BANDWIDTH = 0.4, 0.6
# Bytes a second between the host's memory and a GPU, and what an AdamW on a host's cores passes over.
BUS, HOST = 20e9, 50e9
# Seconds on the host: of vLLM for a sampled token (benchmarks.vllm_host, on a CPU), of Transformers for a layer of one
# decoding step (assumed).
PER_TOKEN, PER_LAYER = 50e-6, 1e-3


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: What ``card`` calls it.
        memory: GiB.
        flops: Operations a second in bf16 with sums in fp32, dense.
        bandwidth: Bytes of its memory a second.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float


# The first of a size stands for it where only a memory is given. Memory is what is left of the printed number where
# error correction takes a part.
CARDS = (
    Card("rtx-4090", 24, 165e12, 1.008e12),
    Card("rtx-3090", 24, 71e12, 0.936e12),
    Card("a10", 22.5, 125e12, 0.6e12),
    Card("l4", 22.5, 121e12, 0.3e12),
    Card("rtx-5090", 32, 210e12, 1.792e12),
    Card("a100-40gb", 40, 312e12, 1.555e12),
    Card("l40s", 45, 362e12, 0.864e12),
    Card("h100", 80, 989e12, 3.35e12),
    Card("a100-80gb", 80, 312e12, 2.039e12),
    Card("h200", 141, 989e12, 4.8e12),
    Card("b200", 180, 2250e12, 8.0e12),
)


def card_of(name: str, memory: float | None = None) -> Card:
    """The card of a name; without one, the first that has so many GiB, or the largest.

    Raises:
        ConfigError: There is no such card here.
    """
    if not name:
        return next((card for card in CARDS if card.memory >= (memory or 80.0)), CARDS[-1])
    for card in CARDS:
        if card.name == name.lower():
            return card
    names = [card.name for card in CARDS]
    close = get_close_matches(name.lower(), names, n=1)
    raise ConfigError(
        f"card is {name!r}, which is none of {', '.join(names)}"
        + (f" (did you mean {close[0]}?)" if close else "")
        + "; for another one give gpu_memory alone"
    )
