"""Seconds of an update on a card: arithmetic from published peaks, see :mod:`real_fast.planning.cards`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from real_fast.config.commands import PlanConfig
from real_fast.planning.cards import BANDWIDTH, BUS, COMPUTE, HOST, OVERLAP, PER_LAYER, PER_TOKEN, Card
from real_fast.planning.flops import UpdateFlops
from real_fast.planning.links import Links
from real_fast.planning.memory import NF4, ModelSizes
from real_fast.planning.need import Need, engine_weights, lengths, training_of
from real_fast.planning.ranks import Ranks

# float32 products without TF32 are slower than bf16 ones by about so much.
FP32 = 8.0
# Bytes of a weight that is unpacked to 16 bits in front of a product: written, and read.
UNPACKED = 4.0


@dataclass(frozen=True)
class Seconds:
    """Of one update.

    Attributes:
        update: Forward and backward passes, of the rank with most prompts.
        rollouts: Sampling, at the longest responses, of the engine with most prompts.
        moving: What waits in the host's memory, over the bus and back, and the host's part of the optimiser's step.
        waiting: For other ranks' weights and gradients, where that does not go on beside the computing.
        sync: New weights to the engines, where there are several GPUs.
        ahead: Whether the next rollouts are sampled while the update goes on.
    """

    update: float
    rollouts: float
    moving: float
    waiting: float = 0.0
    sync: float = 0.0
    ahead: bool = False

    @property
    def total(self) -> float:
        """All of it."""
        training = self.update + self.moving + self.waiting
        return self.sync + (max(training, self.rollouts) if self.ahead else training + self.rollouts)


def seconds(
    config: PlanConfig, sizes: ModelSizes, needed: Need, flops: UpdateFlops, card: Card, samples: bool, kl: bool = False
) -> Seconds:
    """Expected seconds of an update.

    Args:
        config: The run and the machine.
        sizes: The model's.
        needed: What the settings need, which says how many sequences are decoded at a time.
        flops: The update's work, on all ranks together.
        card: What each rank runs on.
        samples: Whether the method samples feedback.
        kl: Whether the KL is in the loss.
    """
    training, ranks = training_of(config), Ranks.of(config)
    links = Links.of(card, ranks, config.network)
    rate = COMPUTE * card.flops / (FP32 if training.precision == "fp32" else 1)
    prompts = config.rollout.prompts_per_step
    update = flops.ours * ranks.of_rank(prompts) / prompts / rate
    update += _unpacking(config, sizes, needed) / (BANDWIDTH * card.bandwidth)
    batches = _micro_batches(config, needed)
    return Seconds(
        update,
        _rollouts(config, sizes, needed, rate, links) if samples else 0.0,
        _moving(config, sizes, batches, samples),
        _waiting(links.update(sizes, training, batches, kl), update),
        links.sync(sizes, training) * samples,
        samples and ranks.apart and config.rollout.ahead > 0,
    )


def _waiting(sending: float, computing: float) -> float:
    """Seconds of sending that are not hidden behind computing."""
    return max((1 - OVERLAP) * sending, sending - computing)


def _rollouts(config: PlanConfig, sizes: ModelSizes, needed: Need, rate: float, links: Links) -> float:
    (p, r), rollout, ranks, card = lengths(config), config.rollout, links.ranks, links.card
    prompts = ranks.of_engine(rollout.prompts_per_step)
    every = prompts * rollout.group_size
    at_a_time = max(1, min(every, rollout.max_num_seqs, needed.sequences))
    training, weights = training_of(config), engine_weights(sizes, training_of(config))
    cache = 2.0 * sizes.kv_width * sizes.layers * at_a_time * (p + r / 2)
    weights += UNPACKED * sizes.linear * training.nf4  # for either engine's products
    of_host = PER_TOKEN * at_a_time
    if rollout.engine == "transformers":  # with the trainer's own model, its adapters beside it
        of_host = PER_LAYER * sizes.layers * (2 if training.rank else 1)
    gpus = ranks.tensor_parallel
    read = (weights + cache) / (BANDWIDTH * card.bandwidth * gpus)
    of_device = max(read, 2.0 * sizes.parameters * at_a_time / (rate * gpus)) + links.decoding(sizes, at_a_time)
    prefill = 2.0 * sizes.parameters * p * prompts / (rate * gpus) + links.decoding(sizes, p * prompts)
    return prefill + math.ceil(every / at_a_time) * r * (of_device + of_host)


def _unpacking(config: PlanConfig, sizes: ModelSizes, needed: Need) -> float:
    """Bytes that 4-bit weights cost an update: unpacked once in each pass over each micro-batch."""
    passes = (2 + config.train.activation_checkpointing) * _micro_batches(config, needed)
    return (NF4 + UNPACKED) * sizes.linear * training_of(config).nf4 * passes


def _micro_batches(config: PlanConfig, needed: Need) -> int:
    """Of one update on each rank."""
    groups = max(1, needed.tokens // needed.group)
    return (
        math.ceil(Ranks.of(config).of_rank(config.rollout.prompts_per_step) / groups) * config.objective.num_iterations
    )


def _moving(config: PlanConfig, sizes: ModelSizes, batches: int, samples: bool) -> float:
    t, moved, passed = training_of(config), 0.0, 0.0
    trained = t.adapters(sizes) or sizes.parameters
    per_weight = 2.0 if t.optimizer == "adamw8bit" else 8.0
    if t.offload == "moments":
        moved += 2 * per_weight * trained
    if t.offload == "all" and not t.rank:
        moved += 2.0 * trained * (1 + batches)  # copies there, and gradients back from each micro-batch
        # Gradients added up, then weights, gradients and moments read and written.
        passed += (10.0 * batches + 4 * 4.0 + 2 * per_weight) * trained
    sleeps = config.rollout.engine not in ("transformers", "vllm-server") and config.rollout.sleep != "never"
    if samples and sleeps and t.rank:
        moved += (
            2 * engine_weights(sizes, t) / config.rollout.tensor_parallel
        )  # a base under adapters waits there while vLLM sleeps
    return moved / BUS + passed / HOST
