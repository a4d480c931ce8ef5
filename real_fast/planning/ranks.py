"""How a run is spread over GPUs: shards of the trainer, engines of the rollouts, and each one's part of the work."""

from __future__ import annotations

import math
from dataclasses import dataclass

from real_fast.config.commands import PlanConfig
from real_fast.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """The GPUs of a run.

    Attributes:
        gpus: Of the trainer, one a rank.
        per_node: Of a machine.
        replicas: Of the sharded model.
        tensor_parallel: GPUs of an engine.
        engine_gpus: GPUs that engines run on: the trainer's, or those of the servers.
        apart: Whether those are GPUs of their own.
    """

    gpus: int
    per_node: int
    replicas: int
    tensor_parallel: int
    engine_gpus: int
    apart: bool

    @classmethod
    def of(cls, config: PlanConfig) -> Ranks:
        """Of a plan's settings. Raises :class:`ConfigError` where the GPUs cannot be shared out, see :meth:`check`."""
        rollout, apart = config.rollout, config.rollout.engine == "vllm-server"
        engine_gpus = (config.engine_gpus or rollout.tensor_parallel) if apart else config.gpus
        ranks = cls(
            config.gpus, config.gpus_per_node, config.train.replicas, rollout.tensor_parallel, engine_gpus, apart
        )
        ranks.check()
        return ranks

    @property
    def shards(self) -> int:
        """Parts that weights, gradients and moments are in."""
        return self.gpus // self.replicas

    @property
    def nodes(self) -> int:
        """Machines of the trainer."""
        return math.ceil(self.gpus / self.per_node)

    @property
    def engines(self) -> int:
        """Engines that sample side by side."""
        return self.engine_gpus // self.tensor_parallel

    def of_rank(self, prompts: int) -> int:
        """Prompts that the busiest rank trains on."""
        return math.ceil(prompts / self.gpus)

    def of_engine(self, prompts: int) -> int:
        """Prompts that the busiest engine samples for."""
        return math.ceil(prompts / self.engines)

    def check(self) -> None:
        """Raise :class:`ConfigError` for numbers that do not divide."""
        for many, name, few in (
            (self.gpus, "train.replicas", self.replicas),
            (self.engine_gpus, "rollout.tensor_parallel", self.tensor_parallel),
            (self.gpus, "gpus_per_node", min(self.per_node, self.gpus)),
        ):
            if many % few:
                raise ConfigError(f"{name} is {few}, and {many} GPUs cannot be shared out among as many: one must "
                                  "divide the other")  # fmt: skip
        if self.tensor_parallel > self.per_node:
            raise ConfigError(
                f"rollout.tensor_parallel is {self.tensor_parallel}, and a machine has {self.per_node} GPUs "
                "(gpus_per_node): an engine is not spread over several"
            )


def check_spread(config: PlanConfig) -> None:
    """Refuse what a run on several GPUs refuses. Raises :class:`ConfigError`, which names the setting."""
    if config.gpus == 1:
        return
    if config.gpus > (prompts := config.rollout.prompts_per_step):
        raise ConfigError(
            f"gpus is {config.gpus}, and rollout.prompts_per_step is {prompts}: some GPUs would never have a prompt to "
            "train on"
        )
    for key, value, usual in (
        ("optim.offload", config.optim.offload, "none"),
        ("train.quantization", config.train.quantization, "none"),
        ("train.weights", config.train.weights, "fp32"),
        ("train.compile", config.train.compile, False),
        ("train.liger", config.train.liger, False),
    ):
        if value != usual:
            raise ConfigError(f"{key} is {value}, which is for one GPU, and gpus is {config.gpus}: leave it out")
