"""The methods by name: a row each. To add one, write its file and its row, and the conformance suite takes it up."""

from __future__ import annotations

from difflib import get_close_matches

from real_fast.config import Config
from real_fast.errors import ConfigError
from real_fast.methods.base import Method
from real_fast.methods.binary_rl import BinaryRL
from real_fast.methods.raft import Raft
from real_fast.methods.real import Real
from real_fast.methods.sft import Sft
from real_fast.methods.tract import Tract

METHODS: dict[str, type[Method]] = {
    Sft.name: Sft,
    Raft.name: Raft,
    Tract.name: Tract,
    BinaryRL.name: BinaryRL,
    Real.name: Real,
}


def method_class(config: Config) -> type[Method]:
    """The class of ``config.method``. Raises :class:`ConfigError` for one that does not exist."""
    if config.method in METHODS:
        return METHODS[config.method]
    close = get_close_matches(config.method, METHODS, n=1)
    hint = f"did you mean {close[0]}? There are" if close else "there are"
    raise ConfigError(f"method is {config.method!r}: {hint} {', '.join(METHODS)}")


def check_config(config: Config) -> type[Method]:
    """Check a run's settings, the method's own included, and return its class. Raises :class:`ConfigError`."""
    method = method_class(config)
    config.validate()
    method.check(config)
    return method
