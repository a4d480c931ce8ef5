"""Seconds that GPUs wait for one another: arithmetic from published links, see :mod:`real_fast.planning.cards`.

What is sent is FSDP2's: each layer, the embedding, and the last norm with the head are a unit, whose weights are
gathered for the forward pass and, but for the head's, once more for the backward pass, and whose gradients are summed
and shared out in float32 behind each micro-batch. A collective goes round a ring, in which each of n GPUs sends
(n - 1) / n of the bytes; a ring over machines uses the ports of all their GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from real_fast.planning.cards import HOP, LINKS, Card
from real_fast.planning.memory import ModelSizes, Training
from real_fast.planning.ranks import Ranks

# Tensors of a layer, each of which is gathered by itself for an engine.
_TENSORS = 12


def _width(t: Training) -> float:
    return 2.0 if t.precision == "bf16" else 4.0


@dataclass(frozen=True)
class Links:
    """What GPUs are linked by.

    Attributes:
        card: Each of them.
        ranks: How many there are.
        network: Bytes a second between machines for each GPU.
    """

    card: Card
    ranks: Ranks
    network: float

    @classmethod
    def of(cls, card: Card, ranks: Ranks, gigabits: float) -> Links:
        """Of a card, with a network of so many Gbit/s for each GPU, or its maker's where that is 0."""
        return cls(card, ranks, gigabits * 1e9 / 8 or card.network)

    def rate(self, gpus: int) -> float:
        """Bytes a second that a ring of neighbours passes on: the slower of a link and of all ports of a machine."""
        per_node = self.ranks.per_node
        return LINKS * (self.card.link if gpus <= per_node else min(self.card.link, per_node * self.network))

    def ring(self, nbytes: float, times: int, gpus: int, rate: float) -> float:
        """Seconds of so many collectives, together of `nbytes`, once round a ring of `gpus`."""
        return (gpus - 1) * (nbytes / gpus / rate + times * HOP)

    def micro_batch(self, sizes: ModelSizes, t: Training, kl: bool) -> float:
        """Seconds of the collectives of one micro-batch, gathered weights and summed gradients.

        Args:
            sizes: The model's.
            t: What is trained.
            kl: Whether a reference is run too.
        """
        shards, replicas = self.ranks.shards, self.ranks.replicas
        width, units, rate = _width(t), sizes.layers + (1 if sizes.tied else 2), self.rate(shards)
        gathered = self.ring(width * (2 * sizes.parameters - sizes.head), 2 * units - 1, shards, rate)
        if kl:
            gathered += self.ring(width * sizes.parameters, units, shards, rate)
        if t.rank:
            return gathered
        summed = self.ring(4.0 * sizes.parameters, units, shards, rate)
        # A shard's sum is added up over the replicas: shared out and gathered, twice round the ring.
        apart = LINKS * (self.card.link if self.ranks.gpus <= self.ranks.per_node else self.network)
        return gathered + summed + 2 * self.ring(4.0 * sizes.parameters / shards, units, replicas, apart)

    def update(self, sizes: ModelSizes, t: Training, batches: int, kl: bool) -> float:
        """Seconds of the collectives of an update: its micro-batches', and at its end adapters' gradients, summed."""
        took = batches * self.micro_batch(sizes, t, kl)
        if t.rank:
            gpus = self.ranks.gpus
            took += 2 * self.ring(4.0 * t.adapters(sizes), 1, gpus, self.rate(gpus))
        return took

    def sync(self, sizes: ModelSizes, t: Training) -> float:
        """Seconds in which new weights reach the engines: gathered tensor by tensor, and sent to servers once."""
        shards, adapters = self.ranks.shards, t.adapters(sizes)
        sent = _width(t) * (adapters or sizes.parameters)
        gathered = 0.0 if adapters else self.ring(sent, _TENSORS * sizes.layers, shards, self.rate(shards))
        return gathered + sent / (LINKS * self.network) * self.ranks.apart

    def decoding(self, sizes: ModelSizes, tokens: float) -> float:
        """Seconds in which the GPUs of an engine add up `tokens` rows of hidden states, twice a layer."""
        gpus, row = self.ranks.tensor_parallel, 2.0 * sizes.hidden
        if gpus == 1:
            return 0.0
        bytes_sent = 2 * (gpus - 1) / gpus * row * tokens
        return 2 * sizes.layers * (2 * HOP + bytes_sent / (LINKS * self.card.link))
