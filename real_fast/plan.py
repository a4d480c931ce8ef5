"""Will it fit, and how much work is it? From the model's config alone, before a weight is downloaded.

python -m real_fast.plan --model Qwen/Qwen3-32B --gpus 8 --gpu-memory 80
python -m real_fast.plan --config configs/qwen3-8b-real.yaml --gpu-memory 141
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from real_fast.config import cli
from real_fast.errors import ConfigError, ModelError, UserError, run_command
from real_fast.planning.plan import PlanConfig, load_config, make_plan, report
from real_fast.runs import log

_OWN = {"gpus", "gpu_memory", "prompt_tokens", "response_tokens"}


def _split(argument: str) -> tuple[str, str]:
    flag, sign, value = argument.partition("=")
    return flag, sign + value


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit status 0 if the settings fit, 1 if not, 2 for a mistake of the user's."""
    # --gpu-memory as people type it, beside the settings' own spelling
    given = [
        f"--{name}{value}" if (name := flag[2:].replace("-", "_")) in _OWN else argument
        for argument in (sys.argv[1:] if argv is None else argv)
        for flag, value in [_split(argument)]
    ]
    config = cli.parse(PlanConfig, "real_fast.plan", "Will a run fit, and how much work is it?", given)
    log.set_up()
    return run_command("real_fast.plan", lambda: _main(config), "stopped")


def _main(config: PlanConfig) -> int:
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
