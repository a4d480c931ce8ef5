"""The optimisers of ``optim.name`` and ``optim.offload: moments``: what AdamW's moments are kept in, and where."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from real_fast.errors import ConfigError

Make = Callable[..., torch.optim.Optimizer]


def adamw(name: str, on_host: bool = False) -> Make:
    """The class of "adamw" or "adamw8bit", to be called with parameters, lr, betas and eps.

    Args:
        name: As ``optim.name``.
        on_host: Keep the moments in the host's memory, see :class:`OnHost`.

    Raises:
        ConfigError: torchao cannot be imported.
    """
    kind: Any = AdamW if name == "adamw" else _adamw8bit()
    return type(f"{kind.__name__}OnHost", (OnHost, kind), {}) if on_host else kind


class AdamW(torch.optim.AdamW):
    """PyTorch's, by its fused kernels."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options, fused=True)


class OnHost(torch.optim.Optimizer):
    """Part of an optimiser whose moments lie in the host's memory, and on the device for a parameter's own step alone.

    Every number is that of the optimiser itself. A step moves the moments of each parameter over the bus and back.
    """

    home = torch.device("cpu")

    def step(self, closure: Any = None) -> Any:
        """As the optimiser's own, a parameter at a time."""
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.param_groups = [{**group, "params": [parameter]}]
                        self._step_one(parameter, super().step)
        finally:
            self.param_groups = groups
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # whoever reads the moments finds them there

    def _step_one(self, parameter: torch.Tensor, step: Callable[[], Any]) -> None:
        at_home = self.state[parameter]
        # The count of steps, a single number, stays where the optimiser has it.
        self.state[parameter] = {
            k: v.to(parameter.device, non_blocking=True) if v.dim() else v for k, v in at_home.items()
        }
        step()
        for key, value in self.state[parameter].items():
            if key not in at_home:
                at_home[key] = _room(value, self.home) if value.dim() else value
            if at_home[key] is not value:
                at_home[key].copy_(value, non_blocking=True)
        self.state[parameter] = at_home


def _room(like: torch.Tensor, home: torch.device) -> torch.Tensor:
    """A tensor of the same kind in the host's memory; for a plain one on a GPU, where the GPU can copy to by itself."""
    if type(like) is not torch.Tensor or not like.is_cuda:
        return like.to(home)
    return torch.empty_like(like, device=home, pin_memory=True)


@functools.cache
def _adamw8bit() -> Any:
    """torchao's AdamW with moments in 8 bits: blocks of 256 share a scale (arXiv 2110.02861). Raises ConfigError."""
    try:
        from torchao.optim import AdamW8bit
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"optim.name is adamw8bit, and torchao cannot be imported ({error}): pip install 'real-fast[torchao]', or "
            "set optim.name to adamw"
        ) from error

    class AdamW8bitHere(AdamW8bit):
        """Compiled on a GPU; on the CPU step by step, where compiling would take a C++ compiler and minutes."""

        def step(self, closure: Any = None) -> Any:
            on_cpu = all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
            with torch.compiler.set_stance("force_eager") if on_cpu else nullcontext():
                return super().step(closure)

    AdamW8bitHere.__name__ = "AdamW8bit"
    return AdamW8bitHere
