"""The smallest change of the settings with which a run fits; what costs nothing is tried before what does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations

from real_fast.config.commands import PlanConfig
from real_fast.planning.memory import ModelSizes, largest
from real_fast.planning.need import Need, need, smallest_share
from real_fast.planning.share import engine_share

NeedOf = Callable[[PlanConfig], Need]
Lever = Callable[[PlanConfig, NeedOf, ModelSizes], PlanConfig]

# Micro-batches are named in such steps.
_STEP = 256


def smallest_change(config: PlanConfig, sizes: ModelSizes, kl: bool, free: bool = False) -> PlanConfig | None:
    """The settings changed in as few places as it takes to fit, or None where nothing helps.

    One change goes before two, two before three. Among as many, in this order: the share that vLLM takes, the size of
    the micro-batch, activation checkpointing, the sequences that Transformers decodes at a time. Then Transformers in
    place of vLLM; at last smaller groups, which change what is trained. `free` leaves out these last two.
    """

    def need_of(changed: PlanConfig) -> Need:
        return need(changed, sizes, kl)

    for start in [config] if free else _starts(config):
        for count in range(len(_LEVERS) + 1):
            for chosen in combinations(_LEVERS, count):
                changed = start
                # The micro-batch takes what the others leave, so it comes last.
                for lever in sorted(chosen, key=lambda lever: lever is _smaller_micro_batch):
                    changed = lever(changed, need_of, sizes)
                if need_of(changed).fits:
                    return changed
    return None


def changed_flags(before: PlanConfig, after: PlanConfig) -> str:
    """The difference as flags of the command line."""
    flags = []
    for section, names in (
        ("rollout", ("engine", "gpu_memory_utilization", "max_num_seqs", "group_size")),
        ("train", ("micro_batch_tokens", "activation_checkpointing")),
    ):
        for name in names:
            value = getattr(getattr(after, section), name)
            if value != getattr(getattr(before, section), name):
                flags.append(f"--{section}.{name}" + ("" if value is True else f" {value}"))
    return " ".join(flags)


def _starts(config: PlanConfig) -> Iterator[PlanConfig]:
    size = config.rollout.group_size
    while True:
        for engine in dict.fromkeys((config.rollout.engine, "transformers")):
            yield replace(config, rollout=replace(config.rollout, group_size=size, engine=engine))
        if size < 4:
            return
        size //= 2


def _smaller_share(config: PlanConfig, need_of: NeedOf, sizes: ModelSizes) -> PlanConfig:
    """As large a share as fits with the other settings as they are, or the smallest that vLLM can work with."""
    rollout = config.rollout
    low, high = round(100 * smallest_share(config, sizes)), round(100 * engine_share(rollout))
    if rollout.engine == "transformers" or low >= high:
        return config
    shares = [
        replace(config, rollout=replace(rollout, gpu_memory_utilization=n / 100)) for n in range(high - 1, low - 1, -1)
    ]
    return next((changed for changed in shares if need_of(changed).fits), shares[-1])


def _smaller_micro_batch(config: PlanConfig, need_of: NeedOf, sizes: ModelSizes) -> PlanConfig:
    """As large a micro-batch as fits, up to the one that was asked for; at least one group."""
    asked, group = config.train.micro_batch_tokens, need_of(config).group

    def of(tokens: int) -> PlanConfig:
        return replace(config, train=replace(config.train, micro_batch_tokens=max(tokens, group)))

    found = largest(lambda tokens: need_of(of(tokens)).fits, max(asked, group))
    return of(found if found == asked else found // _STEP * _STEP)


def _checkpointing(config: PlanConfig, need_of: NeedOf, sizes: ModelSizes) -> PlanConfig:
    return replace(config, train=replace(config.train, activation_checkpointing=True))


def _fewer_sequences(config: PlanConfig, need_of: NeedOf, sizes: ModelSizes) -> PlanConfig:
    able = need_of(config).sequences
    if config.rollout.engine != "transformers" or not 0 < able < config.rollout.max_num_seqs:
        return config
    return replace(config, rollout=replace(config.rollout, max_num_seqs=able))


_LEVERS: tuple[Lever, ...] = (_smaller_share, _smaller_micro_batch, _checkpointing, _fewer_sequences)
