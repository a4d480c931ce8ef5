"""What one device must hold, while it updates and while feedback is sampled, and whether it can."""

from __future__ import annotations

import math
from dataclasses import dataclass

from real_fast.config.commands import GPU_SHARE, PlanConfig
from real_fast.planning.memory import NF4, ModelSizes, Training, UpdateMemory, host_memory, update_memory
from real_fast.planning.ranks import Ranks

GIB = 2**30

# The CUDA context, libraries' workspaces and what the allocator cannot use.
RESERVE = 2 * GIB
# What vLLM takes beside weights and cache (a prefill's activations, graphs, logits), and what it keeps while it sleeps.
# Assumed, not measured.
ENGINE_WORK, ASLEEP = 1.5 * GIB, 1.0 * GIB

# What NCCL's communicators of the trainer, and of engines over several GPUs, keep on a GPU: assumed.
CHANNELS = 1.0 * GIB

# Tokens of "So the overall score is " where no tokenizer is at hand.
PHRASE_TOKENS = 6


@dataclass(frozen=True)
class Need:
    """What one device must hold, and what it has.

    Attributes:
        memory: The update's parts, bytes.
        engine: What the rollout engine holds while it samples, bytes.
        beside: What it holds during the update, bytes.
        share: vLLM's share of the device's memory; 0 for Transformers.
        sequences: Sequences of full length that the engine can decode at a time.
        wanted: Sequences that it must be able to decode at a time.
        group: Tokens of one group, which a micro-batch must hold.
        tokens: Tokens of a micro-batch.
        room: The device's memory, bytes.
        host: What waits in the host's memory, bytes.
        reserve: What the context, libraries and links to other GPUs take, bytes.
        apart: Whether the engine has GPUs of its own: those hold nothing of the trainer while it samples.
    """

    memory: UpdateMemory
    engine: float
    beside: float
    share: float
    sequences: int
    wanted: int
    group: int
    tokens: int
    room: float
    host: float
    reserve: float = RESERVE
    apart: bool = False

    @property
    def update(self) -> float:
        """Bytes on a device during the update."""
        return self.memory.total + self.beside + self.reserve

    @property
    def rollouts(self) -> float:
        """Bytes on a device while feedback is sampled."""
        return self.held + self.engine + self.reserve

    @property
    def held(self) -> float:
        """Bytes of the trainer on a device that samples."""
        return 0.0 if self.apart else self.memory.held

    @property
    def total(self) -> float:
        """The larger of the two."""
        return max(self.update, self.rollouts)

    @property
    def fits(self) -> bool:
        """Whether both fit, a group fits into a micro-batch, and the engine can decode."""
        return self.total <= self.room and self.sequences >= self.wanted and self.group <= self.tokens


def lengths(config: PlanConfig) -> tuple[int, int]:
    """Tokens of a prompt and of a response: those to plan with, or the longest that the settings allow."""
    p = config.prompt_tokens or config.prompt.max_tokens
    return p, config.response_tokens or config.rollout.max_tokens + PHRASE_TOKENS


def training_of(config: PlanConfig) -> Training:
    """What of the settings decides the memory of weights, gradients and optimiser, on a GPU, which the plan is for."""
    train, lora = config.train, config.train.lora
    targets = [] if lora is None or lora.targets == "all-linear" else lora.targets
    targets = [targets] if isinstance(targets, str) else targets
    return Training(
        precision="fp32" if train.precision == "fp32" else "bf16",
        weights=train.weights,
        rank=lora.r if lora is not None else 0,
        targets=tuple(name.rpartition(".")[2] for name in targets),
        nf4=lora is not None and train.quantization == "nf4",
        optimizer=config.optim.name,
        offload=config.optim.offload,
        fused_head=train.head_gradient != "autograd",
        liger=train.liger,
    )


def need(config: PlanConfig, sizes: ModelSizes, kl: bool) -> Need:
    """What a device must hold.

    Args:
        config: The run and the machine, whose ``gpu_memory`` is set.
        sizes: The model's.
        kl: Whether the KL is in the loss.
    """
    (p, r), k, train, rollout = lengths(config), config.rollout.group_size, config.train, config.rollout
    group = p + k * r if train.shared_prompt else k * (p + r)
    ranks = Ranks.of(config)
    prompts = ranks.of_rank(rollout.prompts_per_step)
    groups = max(min(train.micro_batch_tokens // group, prompts), 1)
    training = training_of(config)
    memory = update_memory(
        sizes,
        # No more than there is of it, and one group where even that is too much.
        max(min(train.micro_batch_tokens, prompts * group), group),
        training,
        head_rows=groups * k * r,
        checkpointing=train.activation_checkpointing,
        gpus=ranks.gpus,
        replicas=ranks.replicas,
        # Where a window cuts into the prompt, its keys are laid out for each response.
        repeated_keys=groups * k * p if train.shared_prompt and sizes.window and sizes.window < p + r else 0,
        kl=kl,
    )
    room = config.gpu_memory * GIB
    weights, per_sequence = (n / ranks.tensor_parallel for n in (engine_weights(sizes, training), _cache(sizes, p + r)))
    host, reserve = (
        host_memory(sizes, training),
        RESERVE + CHANNELS * ((ranks.gpus > 1) + (ranks.tensor_parallel > 1 and not ranks.apart)),
    )
    at_a_time = min(rollout.max_num_seqs, k * ranks.of_engine(rollout.prompts_per_step))
    of_device = (group, train.micro_batch_tokens, room)
    if rollout.engine == "transformers":
        # It samples with the trainer's model, of float32 weights with a 16-bit copy, and takes max_num_seqs sequences
        # at a time, whatever the memory. Beside a sharded one it has a model of its own, in float32.
        own = 4.0 * sizes.parameters * (ranks.gpus > 1)
        copy = own + (weights if training.precision == "bf16" and (own or not training.rank) else 0.0)
        able = max(0, int((room - reserve - memory.held - copy) / per_sequence))
        engine = copy + at_a_time * per_sequence
        return Need(memory, engine, own, 0.0, able, at_a_time, *of_device, host, reserve)
    held, total = (0.0, 0.0) if ranks.apart else (memory.held, memory.total)
    sleeps = rollout.sleep != "never" or ranks.apart
    if rollout.gpu_memory_utilization == "auto":
        useful = weights + ENGINE_WORK + at_a_time * per_sequence
        free = room - reserve - (held if sleeps else total)
        share = max(0, math.floor(100 * min(useful / room + 0.01, free / room, GPU_SHARE) + 1e-9)) / 100
    else:
        share = float(rollout.gpu_memory_utilization)
    # vLLM decodes as many sequences as its cache holds.
    sequences = max(0, int((share * room - weights - ENGINE_WORK) / per_sequence))
    beside = 0.0 if ranks.apart else ASLEEP if sleeps else share * room
    # A base under adapters waits there while vLLM sleeps.
    host += weights * (sleeps and training.rank > 0 and not ranks.apart)
    return Need(memory, share * room, beside, share, sequences, 1, *of_device, host, reserve, ranks.apart)


def engine_weights(sizes: ModelSizes, training: Training) -> float:
    """Bytes of the rollout engine's weights: in the trainer's precision, or its 4 bits under adapters."""
    width = 2.0 if training.precision == "bf16" else 4.0
    linear = NF4 if training.nf4 else width
    return linear * sizes.linear + width * (sizes.parameters - sizes.linear)


def smallest_share(config: PlanConfig, sizes: ModelSizes) -> float:
    """The smallest rollout.gpu_memory_utilization, in hundredths, with which vLLM decodes one group at a time."""
    p, r = lengths(config)
    cache = _cache(sizes, p + r) * config.rollout.group_size
    held = (engine_weights(sizes, training_of(config)) + cache) / config.rollout.tensor_parallel + ENGINE_WORK
    return math.ceil(held * 100 / (config.gpu_memory * GIB)) / 100


def _cache(sizes: ModelSizes, tokens: int) -> float:
    """Bytes of keys and values, in 16 bits."""
    return 2.0 * sizes.kv_width * sizes.layers * tokens
