"""The smallest change of the settings with which a run fits; what costs nothing is tried before what does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Literal

from real_fast.config import LoraConfig, OptimConfig
from real_fast.config.commands import PlanConfig
from real_fast.planning.memory import ModelSizes, largest
from real_fast.planning.need import Need, need, smallest_share

NeedOf = Callable[[PlanConfig], Need]
Engine = Literal["auto", "transformers", "vllm", "vllm-server"]
Lever = Callable[[PlanConfig, NeedOf, ModelSizes], PlanConfig]

# Micro-batches are named in such steps.
_STEP = 256


def smallest_change(config: PlanConfig, sizes: ModelSizes, kl: bool, free: bool = False) -> PlanConfig | None:
    """The settings changed in as few places as it takes to fit, or None where nothing helps.

    First what changes no number of the training: one such change goes before two, two before three; among as many, in
    this order: the share that vLLM takes, its sleep during the update, the size of the micro-batch, activation
    checkpointing, the sequences that Transformers decodes at a time, the GPUs that an engine is spread over. Then, in
    this order and with as few of those as it takes: the optimiser (moments in the host's memory, in 8 bits, both,
    everything in the host's memory), adapters, adapters over 4 bits; Transformers in place of vLLM; at last smaller
    groups. What is for one GPU alone is not tried on several. `free` stops in front of the adapters.
    """

    def need_of(changed: PlanConfig) -> Need:
        return need(changed, sizes, kl)

    for start in rungs(config, free) if free else _starts(config):
        if not need_of(_pulled(start, _LEVERS, need_of, sizes)).fits:
            continue
        for count in range(len(_LEVERS) + 1):
            for chosen in combinations(_LEVERS, count):
                changed = _pulled(start, chosen, need_of, sizes)
                if need_of(changed).fits:
                    return changed
    return None


def rungs(config: PlanConfig, same: bool = False) -> Iterator[PlanConfig]:
    """The settings, then with the optimiser in less and less of the device's memory, at last with adapters.

    Args:
        config: The settings to start from.
        same: Leave out what trains other weights than they do.
    """
    yield config
    if config.train.lora is None:
        for optim in optimisers(config):
            if optim != config.optim:
                yield replace(config, optim=optim)
        if not same:
            yield with_adapters(config, "none")
    if config.gpus == 1 and config.train.quantization == "none" and (config.train.lora is not None or not same):
        yield with_adapters(config, "nf4")


def optimisers(config: PlanConfig) -> list[OptimConfig]:
    """The optimiser in ever less of the device's memory."""
    return [
        replace(config.optim, name=name, offload=offload)
        for name, offload in _OPTIMISERS
        if config.gpus == 1 or offload == "none"
    ]


def with_adapters(config: PlanConfig, quantization: Literal["none", "nf4"]) -> PlanConfig:
    """The settings with adapters in place of the weights, whose optimiser is too small to be worth moving."""
    optim = config.optim if config.train.lora is not None else replace(config.optim, name="adamw", offload="none")
    train = replace(config.train, lora=config.train.lora or LoraConfig(), quantization=quantization)
    return replace(config, train=train, optim=optim)


_OPTIMISERS: tuple[tuple[Literal["adamw", "adamw8bit"], Literal["none", "moments", "all"]], ...] = (
    ("adamw", "none"),
    ("adamw", "moments"),
    ("adamw8bit", "none"),
    ("adamw8bit", "moments"),
    ("adamw", "all"),
)


def changed_flags(before: PlanConfig, after: PlanConfig) -> str:
    """The difference as flags of the command line."""
    flags = []
    for section, names in (
        ("rollout", ("engine", "gpu_memory_utilization", "sleep", "tensor_parallel", "max_num_seqs", "group_size")),
        ("optim", ("name", "offload")),
        ("train", ("quantization", "micro_batch_tokens", "activation_checkpointing")),
    ):
        for name in names:
            value = getattr(getattr(after, section), name)
            if value != getattr(getattr(before, section), name):
                flags.append(f"--{section}.{name}" + ("" if value is True else f" {value}"))
    if after.train.lora is not None and before.train.lora is None:
        flags.append(f"--train.lora.r {after.train.lora.r}")
    return " ".join(flags)


def engines(config: PlanConfig) -> list[Engine]:
    """The engine, and what may stand in its place: Transformers, where the model is not sharded."""
    own = config.rollout.engine
    return [own] if config.gpus > 1 or own == "transformers" else [own, "transformers"]


def _starts(config: PlanConfig) -> Iterator[PlanConfig]:
    size = config.rollout.group_size
    while True:
        for engine in engines(config):
            yield from rungs(replace(config, rollout=replace(config.rollout, group_size=size, engine=engine)))
        if size < 4:
            return
        size //= 2


def _pulled(start: PlanConfig, levers: tuple[Lever, ...], need_of: NeedOf, sizes: ModelSizes) -> PlanConfig:
    """The settings with some levers pulled."""
    # The micro-batch takes what the others leave, so it comes last.
    for lever in sorted(levers, key=lambda lever: lever is _smaller_micro_batch):
        start = lever(start, need_of, sizes)
    return start


def _smaller_share(config: PlanConfig, need_of: NeedOf, sizes: ModelSizes) -> PlanConfig:
    """As large a share as fits with the other settings as they are, or the smallest that vLLM can work with."""
    rollout = config.rollout
    if rollout.engine in ("transformers", "vllm-server") or rollout.gpu_memory_utilization == "auto":
        return config
    low, high = round(100 * smallest_share(config, sizes)), round(100 * float(rollout.gpu_memory_utilization))
    if low >= high:
        return config
    shares = [
        replace(config, rollout=replace(rollout, gpu_memory_utilization=n / 100)) for n in range(high - 1, low - 1, -1)
    ]
    return next((changed for changed in shares if need_of(changed).fits), shares[-1])


def _sleep(config: PlanConfig, need_of: NeedOf, sizes: ModelSizes) -> PlanConfig:
    if config.rollout.engine in ("transformers", "vllm-server") or config.rollout.sleep != "never":
        return config
    return replace(config, rollout=replace(config.rollout, sleep="auto"))


def _smaller_micro_batch(config: PlanConfig, need_of: NeedOf, sizes: ModelSizes) -> PlanConfig:
    """As large a micro-batch as fits, up to the one that was asked for; at least one group."""
    asked, group = config.train.micro_batch_tokens, need_of(config).group
    found = largest_micro_batch(config, need_of, max(asked, group))
    return with_micro_batch(config, max(rounded(found, asked), group))


def largest_micro_batch(config: PlanConfig, need_of: NeedOf, limit: int) -> int:
    """Most tokens of a micro-batch that fit, up to a limit; less than a group where none do."""
    group = need_of(config).group
    return largest(lambda tokens: need_of(with_micro_batch(config, max(tokens, group))).fits, limit)


def rounded(found: int, asked: int) -> int:
    """Tokens of a micro-batch as they are named: what was asked for, or whole steps."""
    return asked if found >= asked else found // _STEP * _STEP


def with_micro_batch(config: PlanConfig, tokens: int) -> PlanConfig:
    """The settings with ``train.micro_batch_tokens``."""
    return replace(config, train=replace(config.train, micro_batch_tokens=tokens))


def _checkpointing(config: PlanConfig, need_of: NeedOf, sizes: ModelSizes) -> PlanConfig:
    return replace(config, train=replace(config.train, activation_checkpointing=True))


def _fewer_sequences(config: PlanConfig, need_of: NeedOf, sizes: ModelSizes) -> PlanConfig:
    able = need_of(config).sequences
    if config.rollout.engine != "transformers" or not 0 < able < config.rollout.max_num_seqs:
        return config
    return replace(config, rollout=replace(config.rollout, max_num_seqs=able))


def _wider_engines(config: PlanConfig, need_of: NeedOf, sizes: ModelSizes) -> PlanConfig:
    """Each engine over as few GPUs of a machine as it takes, where the run has several, or over all of one's."""
    wider = config
    for gpus in range(config.rollout.tensor_parallel + 1, min(config.gpus, config.gpus_per_node) + 1):
        # Heads are shared out evenly, and there are powers of two of them.
        if config.gpus > 1 and config.gpus % gpus == 0 and gpus & (gpus - 1) == 0:
            wider = replace(config, rollout=replace(config.rollout, tensor_parallel=gpus))
            if need_of(wider).fits:
                break
    return wider


_LEVERS: tuple[Lever, ...] = (
    _smaller_share,
    _sleep,
    _smaller_micro_batch,
    _checkpointing,
    _fewer_sequences,
    _wider_engines,
)
