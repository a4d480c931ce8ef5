"""Which models are mixtures of experts."""

from __future__ import annotations

from typing import Any

# What model configs call the number of experts.
_NAMES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def is_mixture(config: Any) -> bool:
    """Whether a Transformers config is that of a mixture of experts."""
    text = config.get_text_config()
    return any((getattr(text, name, None) or 0) > 1 for name in _NAMES)
