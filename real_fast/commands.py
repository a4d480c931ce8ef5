"""The entry of every command: which one, its settings, and only then the code that does the work.

``real-fast train``, ``python -m real_fast train`` and ``python -m real_fast.train`` are the same. PyTorch and
Transformers take seconds to import, so ``--help`` and a mistake in the settings are answered before that.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from real_fast.config import cli
from real_fast.config.commands import COMMANDS
from real_fast.config.keys import one_of
from real_fast.distributed.launch import check_alone
from real_fast.errors import UserError, run_command
from real_fast.model.judge_settings import defaults_of
from real_fast.runs import log

_INTERRUPTED = {
    "train": "stopped at once: --resume goes on from the newest complete checkpoint, or starts over without one",
    "evaluate": "stopped before the end: no evaluation was written",
    "judge": "stopped; every batch that was finished has been written",
    "compare": "stopped: no comparison was written",
    "plan": "stopped",
    "serve": "stopped: a run that was using this server goes on with --resume, once there is another",
}


def run(name: str, argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        name: One of COMMANDS, whose module in `real_fast` has ``work(settings)``.
        argv: Its arguments; without them, those of the process.

    Returns:
        The exit status: what the work returns, 2 for a mistake of the user's, 130 for Ctrl-C.
    """
    prog, command = f"real-fast {name}", COMMANDS[name]

    def work() -> int:
        if name != "train":
            check_alone(prog)
        try:
            settings = cli.parse(command, prog, argv, defaults_of if command.asks_model else None)
        except UserError as error:
            error.on_all_ranks = True
            raise
        log.set_up(getattr(settings, "log_level", "info"))
        return int(import_module(f"real_fast.{name}").work(settings))

    return run_command(prog, work, _INTERRUPTED[name])


def main(argv: Sequence[str] | None = None) -> int:
    """``real-fast COMMAND ...``. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments else "--help"
    if name in ("--help", "-h", "help") and arguments and arguments[0] in COMMANDS:
        name, arguments = arguments[0], ["--help", *arguments[1:]]
    if name in COMMANDS:
        return run(name, arguments)
    return run_command("real-fast", lambda: _about(name), "stopped")


def _about(name: str) -> int:
    """What there is, or the version, or that there is no such command."""
    if name == "--version":
        print(cli.versions())
        return 0
    if name in ("--help", "-h", "help"):
        print("usage: real-fast COMMAND [--help] [--version] ...\n")
        print("\n".join(f"  {command:<10} {row.about}" for command, row in COMMANDS.items()))
        print("\nreal-fast COMMAND --help explains a command. With nothing else: real-fast train --config quickstart")
        return 0
    print(f"real-fast: error: {one_of('command', name, COMMANDS)}", file=sys.stderr)
    return 2
