"""How many processes a launcher started, by the environment alone: asked before what takes seconds to import."""

from __future__ import annotations

import os

from real_fast.errors import ConfigError, ElsewhereError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK")
_BELOW = {"RANK": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_WORLD_SIZE"}
# Launchers that start several processes without torchrun's variables, by what they say of their number.
_OTHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}


def launched() -> int:
    """How many ranks a launcher started. Raises :class:`ConfigError` for a launch that is not torchrun's, or a part."""
    known = [name for name in _VARIABLES if name in os.environ]
    if "WORLD_SIZE" not in known and "RANK" not in known:
        for name, launcher in _OTHERS.items():
            if os.environ.get(name, "1").isdecimal() and int(os.environ.get(name, "1")) > 1:
                raise ConfigError(
                    f"{launcher} started {os.environ[name]} processes ({name}) without torchrun's variables, and each "
                    "would be a run of its own in the same folder: let it start one torchrun a node "
                    "(docs/scaling.md), or one process"
                )
        return 1
    start = "start the ranks with torchrun --nproc-per-node N -m real_fast.train ..."
    for one, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if other not in known:
            raise ConfigError(f"{one} is set, and {other} is not: {start}, or unset it for one process")
    numbers = {name: os.environ[name] for name in _NUMBERS if name in known}
    for name, value in numbers.items():
        most = int(numbers[_BELOW[name]]) if name in _BELOW and numbers.get(_BELOW[name], "").isdecimal() else None
        if not value.isdecimal() or (most is not None and int(value) >= most):
            raise ConfigError(f"{name} is {value!r}, which no launcher gives: {start}")
    size = int(numbers["WORLD_SIZE"])
    if size > 1 and (missing := [name for name in _VARIABLES if name not in known]):
        raise ConfigError(f"WORLD_SIZE is {size}, and {', '.join(missing)} is not set: {start}")
    return size


def check_alone(command: str) -> None:
    """Refuse several processes for a command that is one. Raises :class:`ConfigError`, on the first of them."""
    if (size := launched()) > 1:
        message = (
            f"torchrun started {size} processes, and {command} is one: each would do the same work and write the same "
            "files. Start it without torchrun"
        )
        raise (ConfigError if os.environ["RANK"] == "0" else ElsewhereError)(message)
