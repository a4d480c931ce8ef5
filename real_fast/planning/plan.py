"""A plan: parameters, memory by part, what fits and the work of an update, from a model's shape alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

from real_fast.config.commands import PlanConfig
from real_fast.config.schema import Config
from real_fast.config.validation import check_bounds
from real_fast.planning.cards import Card, card_of
from real_fast.planning.changes import (
    engines,
    largest_micro_batch,
    optimisers,
    rounded,
    smallest_change,
    with_adapters,
    with_micro_batch,
)
from real_fast.planning.flops import UpdateFlops
from real_fast.planning.memory import largest
from real_fast.planning.need import Need, lengths, need, training_of
from real_fast.planning.ranks import check_spread
from real_fast.planning.seconds import Seconds, seconds
from real_fast.planning.shape import Shape, shape_of
from real_fast.planning.spread import Spread, spread

# Most tokens of a micro-batch that are looked at.
_MOST = 2**20


@dataclass(frozen=True)
class Rung:
    """One way to train, and whether it fits.

    Attributes:
        config: The settings.
        tokens: Most tokens of a micro-batch that fit; 0 if not even a group does.
        need: What the settings need with a micro-batch as asked for, or as large as fits.
        seconds: Of an update.
    """

    config: PlanConfig
    tokens: int
    need: Need
    seconds: Seconds


@dataclass(frozen=True)
class Plan:
    """Everything that the report says.

    Attributes:
        shape: The model's.
        need: What a device must hold with the settings as they are.
        flops: The work of an update.
        seconds: Of an update, with the settings as they are or, where they do not fit, with the smallest change.
        card: What the seconds are of.
        change: The settings with the smallest change that fits; None where nothing helps.
        device: Where nothing helps, the GiB of the smallest device that does, and the settings for it.
        rungs: Ways to train, with what fits.
        adapters: Whether the settings train adapters.
        spread: The same run on more GPUs; empty where it is planned on one.
    """

    shape: Shape
    need: Need
    flops: UpdateFlops
    seconds: Seconds
    card: Card
    change: PlanConfig | None
    device: tuple[int, PlanConfig] | None
    rungs: list[Rung]
    adapters: bool
    spread: list[Spread]

    @property
    def cheapest(self) -> Rung | None:
        """Of what fits and trains the same weights as the settings, the fastest; else the fastest of all that fits."""
        fitting = [rung for rung in self.rungs if rung.tokens]
        same = [rung for rung in fitting if (rung.config.train.lora is not None) == self.adapters]
        return min(same or fitting, key=lambda rung: rung.seconds.total, default=None)


def settled(config: PlanConfig) -> PlanConfig:
    """The settings with ``gpu_memory`` set: the card's, where only that was given. Raises :class:`ConfigError`."""
    if config.gpu_memory:
        return config
    return replace(config, gpu_memory=card_of(config.card).memory)


def make_plan(config: PlanConfig) -> Plan:
    """Count parameters, memory and operations.

    Args:
        config: The run and the machine, :func:`settled`.

    Raises:
        ConfigError: A setting out of its bounds or for one GPU alone, GPUs that do not divide, or an unknown method or
            card.
        ModelError: A model whose shape is not to be had or not counted.
    """
    check_bounds(config)
    check_spread(config)
    samples = _uses_rollouts(config)
    shape, card = shape_of(config.model, config.trust_remote_code), card_of(config.card, config.gpu_memory)
    sizes, kl = shape.sizes, samples and config.objective.kl_coef > 0

    def need_of(changed: PlanConfig) -> Need:
        return need(changed, sizes, kl)

    def flops_of(changed: PlanConfig) -> UpdateFlops:
        (p, r), k = lengths(changed), changed.rollout.group_size
        return shape.flops.update_of(
            [(p, [(r - 1, r)] * k)] * changed.rollout.prompts_per_step,
            changed.train.shared_prompt,
            changed.train.activation_checkpointing,
            kl=kl,
            iterations=changed.objective.num_iterations if samples else 1,
            adapters=training_of(changed).adapters(sizes),
        )

    def seconds_of(changed: PlanConfig) -> Seconds:
        return seconds(changed, sizes, need_of(changed), flops_of(changed), card, samples, kl)

    def rung(start: PlanConfig) -> Rung:
        for engine, checkpointing in product(engines(start), (False, True)):
            train = replace(start.train, activation_checkpointing=checkpointing)
            changed = replace(start, train=train, rollout=replace(start.rollout, engine=engine))
            tokens, group = largest_micro_batch(changed, need_of, _MOST), need_of(changed).group
            if tokens >= group:
                break
        # Of sizes that fit, the one that was asked for.
        changed = with_micro_batch(changed, max(group, rounded(tokens, start.train.micro_batch_tokens)))
        return Rung(changed, tokens if tokens >= group else 0, need_of(changed), seconds_of(changed))

    change, device = smallest_change(config, sizes, kl), None
    if change is None:
        change_on = partial(smallest_change, sizes=sizes, kl=kl, free=True)

        def fits_on(gib: int) -> bool:
            return change_on(replace(config, gpu_memory=float(gib))) is not None

        least = 2**12 - largest(lambda less: fits_on(2**12 - less), 2**12 - 1)
        if (settings := change_on(replace(config, gpu_memory=float(least)))) is not None:
            device = least, settings
    return Plan(
        shape,
        need_of(config),
        flops_of(config),
        seconds_of(config if change is None else change),
        card,
        change,
        device,
        [rung(start) for start in _ladder(config)],
        config.train.lora is not None,
        spread(change or config, lambda more: (need_of(more), seconds_of(more))) if config.gpus > 1 else [],
    )


def _ladder(config: PlanConfig) -> Iterator[PlanConfig]:
    """Every way to train, whichever the settings are: all weights, with less and less on the device, then adapters."""
    whole = replace(config, train=replace(config.train, lora=None, quantization="none"))
    for optim in optimisers(config):
        yield replace(whole, optim=optim)
    yield with_adapters(config, "none")
    if config.gpus == 1:
        yield with_adapters(config, "nf4")


def _uses_rollouts(config: PlanConfig) -> bool:
    """Whether the method samples; the registry, which brings PyTorch along, is asked only where it matters."""
    usual = Config()
    if config.method == usual.method and not config.objective.kl_coef and config.objective.num_iterations == 1:
        return True
    from real_fast.methods.registry import method_class

    return bool(method_class(config).uses_rollouts)
