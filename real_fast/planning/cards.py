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
# Between GPUs, all assumed: the share of a link's published rate, seconds that a message takes to the next GPU of a
# ring, and how much of the messages goes on beside the computing.
LINKS, HOP, OVERLAP = 0.7, 5e-6, 0.8


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: What ``card`` calls it.
        memory: GiB.
        flops: Operations a second in bf16 with sums in fp32, dense.
        bandwidth: Bytes of its memory a second.
        link: Bytes a second from it to another GPU of its machine, one way: half of what its data sheet gives for both
            of NVLink (A100 600 GB/s, H100 and H200 900, B200 1800) or of PCIe with 16 lanes (64, generation 5 128).
        network: Bytes a second from it to another machine: a DGX has a port for each GPU, of 200 Gbit/s (A100) or 400
            (H100, H200, B200; docs.nvidia.com/dgx-basepod). Others are taken to share one of 100 Gbit/s among eight.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float


# PCIe with 16 lanes, of generation 4 and 5; a port of 100 Gbit/s for eight GPUs.
_PCIE4, _PCIE5, _SHARED = 32e9, 64e9, 100e9 / 8 / 8

# The first of a size stands for it where only a memory is given. Memory is what is left of the printed number where
# error correction takes a part.
CARDS = (
    Card("rtx-4090", 24, 165e12, 1.008e12, _PCIE4, _SHARED),
    Card("rtx-3090", 24, 71e12, 0.936e12, _PCIE4, _SHARED),
    Card("a10", 22.5, 125e12, 0.6e12, _PCIE4, _SHARED),
    Card("l4", 22.5, 121e12, 0.3e12, _PCIE4, _SHARED),
    Card("rtx-5090", 32, 210e12, 1.792e12, _PCIE5, _SHARED),
    Card("a100-40gb", 40, 312e12, 1.555e12, 300e9, 25e9),
    Card("l40s", 45, 362e12, 0.864e12, _PCIE4, _SHARED),
    Card("h100", 80, 989e12, 3.35e12, 450e9, 50e9),
    Card("a100-80gb", 80, 312e12, 2.039e12, 300e9, 25e9),
    Card("h200", 141, 989e12, 4.8e12, 450e9, 50e9),
    Card("b200", 180, 2250e12, 8.0e12, 900e9, 50e9),
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
