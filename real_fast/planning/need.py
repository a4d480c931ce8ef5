"""What one device must hold with given settings, and whether it does."""

from __future__ import annotations

from dataclasses import dataclass

from real_fast.config.commands import PlanConfig
from real_fast.planning.memory import ModelSizes, UpdateMemory, update_memory
from real_fast.planning.share import engine_share

GIB = 2**30

# The CUDA context, libraries' workspaces and what the allocator cannot use.
RESERVE = 2 * GIB

# Tokens of "So the overall score is " where no tokenizer is at hand.
PHRASE_TOKENS = 6


@dataclass(frozen=True)
class Need:
    """What one device must hold, and what it has.

    Attributes:
        memory: The update's parts, bytes.
        engine: What the rollout engine holds during the update, bytes.
        sequences: Sequences of full length that the engine can decode at a time.
        wanted: Sequences that it must be able to decode at a time.
        group: Tokens of one group, which a micro-batch must hold.
        tokens: Tokens of a micro-batch.
        room: The device's memory, bytes.
    """

    memory: UpdateMemory
    engine: float
    sequences: int
    wanted: int
    group: int
    tokens: int
    room: float

    @property
    def total(self) -> float:
        """Bytes on a device during the update, the rollout engine included."""
        return self.memory.total + self.engine + RESERVE

    @property
    def fits(self) -> bool:
        """Whether update and engine fit, a group fits into a micro-batch, and the engine can decode."""
        return self.total <= self.room and self.sequences >= self.wanted and self.group <= self.tokens


def lengths(config: PlanConfig) -> tuple[int, int]:
    """Tokens of a prompt and of a response: those to plan with, or the longest that the settings allow."""
    p = config.prompt_tokens or config.prompt.max_tokens
    return p, config.response_tokens or config.rollout.max_tokens + PHRASE_TOKENS


def precision_of(config: PlanConfig) -> str:
    """The number format of matrix products on a GPU, which the plan is for."""
    return "fp32" if config.train.precision == "fp32" else "bf16"


def need(config: PlanConfig, sizes: ModelSizes, kl: bool) -> Need:
    """What a device must hold.

    Args:
        config: The run and the machine.
        sizes: The model's, counted in the config's precision.
        kl: Whether the KL is in the loss.
    """
    (p, r), k, train = lengths(config), config.rollout.group_size, config.train
    group = p + k * r if train.shared_prompt else k * (p + r)
    groups = max(train.micro_batch_tokens // group, 1)
    memory = update_memory(
        sizes,
        train.micro_batch_tokens,
        head_rows=groups * k * r,
        precision=precision_of(config),
        checkpointing=train.activation_checkpointing,
        gpus=config.gpus,
        repeated_keys=groups * k * p if train.shared_prompt else 0,
        kl=kl,
    )
    room = config.gpu_memory * GIB
    weights, per_sequence = 2.0 * sizes.parameters, 2.0 * sizes.kv_width * sizes.layers * (p + r)
    if config.rollout.engine == "transformers":
        # Its 16-bit weights and its cache live only while it samples, when the update's activations do not. It takes
        # max_num_seqs sequences at a time, whatever the memory.
        free = room - RESERVE - 16.0 * sizes.parameters / config.gpus - weights
        at_a_time = min(config.rollout.max_num_seqs, k * config.rollout.prompts_per_step)
        return Need(memory, 0.0, max(0, int(free / per_sequence)), at_a_time, group, train.micro_batch_tokens, room)
    held = engine_share(config.rollout) * room
    # Sharded over the devices, each sequence's cache is as well. vLLM decodes as many as its cache holds.
    sequences = max(0, int((held - weights / config.gpus) * config.gpus / per_sequence))
    return Need(memory, held, sequences, 1, group, train.micro_batch_tokens, room)


def smallest_share(config: PlanConfig, sizes: ModelSizes) -> float:
    """The smallest rollout.gpu_memory_utilization, in hundredths, with which vLLM decodes one group at a time."""
    p, r = lengths(config)
    cache = 2.0 * sizes.kv_width * sizes.layers * (p + r) * config.rollout.group_size / config.gpus
    held = 2.0 * sizes.parameters / config.gpus + cache
    return float(-(-held * 100 // (config.gpu_memory * GIB))) / 100
