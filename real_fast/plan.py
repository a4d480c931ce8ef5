"""Will it fit, and how much work is it? From the model's config alone, before a weight is downloaded.

real-fast plan --model Qwen/Qwen3-32B --gpus 8 --gpu-memory 80
real-fast plan --config configs/qwen3-8b-real.yaml --gpu-memory 141
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from real_fast.commands import run
from real_fast.config.commands import PlanConfig
from real_fast.errors import ConfigError, ModelError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit status 0 if the settings fit, 1 if not, 2 for a mistake of the user's."""
    return run("plan", argv)


def work(config: PlanConfig) -> int:
    """What the command does. Returns the exit status."""
    from real_fast.planning.plan import load_config, make_plan, report

    if not config.model:
        raise ConfigError("model is not set: --model NAME")
    model_config = load_config(config.model, config.trust_remote_code)
    try:
        plan = make_plan(config, model_config)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise ModelError(f"model {config.model} cannot be planned: {error}") from error
    print(report(config, plan))
    return 0 if plan.fits(config.gpu_memory) else 1


if __name__ == "__main__":
    sys.exit(main())
