"""The command that serves: a vLLM server which samples rollouts, and takes the trainer's weights.

real-fast serve --config run.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from real_fast.commands import run
from real_fast.config.commands import ServeConfig
from real_fast.config.validation import check_bounds
from real_fast.errors import ConfigError
from real_fast.rollout.serving import serve


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit status 0 for a server that was told to stop, 2 for a mistake of the user's."""
    return run("serve", argv)


def work(config: ServeConfig) -> int:
    """What the command does. Returns the exit status, as :func:`main` says."""
    if not config.model:
        raise ConfigError("model is not set: give --model or put it into the config file")
    check_bounds(config)
    serve(config, config.host, config.port, config.gpus, config.copies, config.transfer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
