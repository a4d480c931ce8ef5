"""The command that plans: will a run fit, and how much work is it? From the model's shape alone, without a weight.

real-fast plan --config qwen3-8b-real --gpu_memory 141
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from real_fast.commands import run
from real_fast.config.commands import PlanConfig
from real_fast.errors import ConfigError
from real_fast.planning.plan import make_plan, settled
from real_fast.planning.report import report


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit status 0 if the settings fit, 1 if not, 2 for a mistake of the user's."""
    return run("plan", argv)


def work(config: PlanConfig) -> int:
    """What the command does. Returns the exit status, as :func:`main` says."""
    if not config.model:
        raise ConfigError("model is not set: give --model or put it into the config file")
    config = settled(config)
    plan = make_plan(config)
    print(report(config, plan))
    return 0 if plan.need.fits else 1


if __name__ == "__main__":
    sys.exit(main())
