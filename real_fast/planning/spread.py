"""The same run on ever more GPUs: what is left of each one's speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from real_fast.config.commands import PlanConfig
from real_fast.planning.need import Need
from real_fast.planning.ranks import Ranks
from real_fast.planning.seconds import Seconds

# Times that the GPUs are doubled.
_DOUBLED = 4


@dataclass(frozen=True)
class Spread:
    """A number of GPUs, and one way to share the model out among them.

    Attributes:
        config: The settings, with so many GPUs.
        fits: Whether they fit.
        seconds: Of an update.
        efficiency: Updates a second and GPU over those of the settings that the list starts with.
    """

    config: PlanConfig
    fits: bool
    seconds: Seconds
    efficiency: float


def spread(config: PlanConfig, counted: Callable[[PlanConfig], tuple[Need, Seconds]]) -> list[Spread]:
    """The settings on as many GPUs, on twice as many, and so on.

    From the second on in two ways: with the replicas that were asked for, each over more GPUs, and with more replicas
    over as many GPUs as before (HSDP). Engines on GPUs of their own grow with the trainer.

    Args:
        config: The settings.
        counted: What settings need, and their seconds.
    """
    most = config.rollout.prompts_per_step // config.gpus  # each GPU has one at least
    points, first = [], gpu_seconds(config, counted(config)[1])
    for times in (2**n for n in range(_DOUBLED + 1) if 2**n <= most):
        ways = dict.fromkeys((config.train.replicas, config.train.replicas * times))
        for replicas in ways:
            more = replace(
                config,
                gpus=config.gpus * times,
                engine_gpus=Ranks.of(config).engine_gpus * times,
                train=replace(config.train, replicas=replicas),
            )
            need, took = counted(more)
            points.append(Spread(more, need.fits, took, first / gpu_seconds(more, took)))
    return points


def gpu_seconds(config: PlanConfig, seconds: Seconds) -> float:
    """Seconds of an update times the GPUs that it takes."""
    ranks = Ranks.of(config)
    return seconds.total * (ranks.gpus + ranks.engine_gpus * ranks.apart)
