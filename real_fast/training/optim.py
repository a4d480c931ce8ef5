"""AdamW in its kinds, its schedule, and a step that is skipped where the gradient is not finite."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from real_fast.config import OptimConfig
from real_fast.distributed.shard import whole
from real_fast.distributed.world import ALONE, World
from real_fast.training.adamw import adamw


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW of ``optim.name`` with weight decay on matrices alone (not on norms and biases).

    Raises:
        ConfigError: torchao is asked for and cannot be imported.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    kind = adamw(config.name, on_host=config.offload == "moments")
    betas = (config.beta1, config.beta2)
    return kind([g for g in groups if g["params"]], lr=config.lr, betas=betas, eps=config.eps)


def build_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> LambdaLR:
    """Linear warm-up, then constant or cosine to zero."""
    name = "cosine" if config.schedule == "cosine" else "constant_with_warmup"
    scheduler: LambdaLR = get_scheduler(
        name, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=max(steps, 1)
    )
    return scheduler


def clip_and_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float, world: World = ALONE
) -> tuple[float, bool]:
    """Clip, step and clear the gradient; leave weights and moments alone where the gradient is not finite.

    Args:
        model: Holds the gradients.
        optimizer: Its optimiser.
        max_grad_norm: Largest norm; 0 for no clipping.
        world: All its processes take the step, or none does.

    Returns:
        The gradient's norm before clipping, and whether a step was taken.
    """
    if world.size > 1:
        _add_up(model, world)
    trained = [p for p in model.parameters() if p.grad is not None]
    # The one wait of an update.
    norm = float(whole(nn.utils.clip_grad_norm_(trained, max_grad_norm or float("inf"))))
    finite = world.all(math.isfinite(norm))
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


def _add_up(model: nn.Module, world: World) -> None:
    """Gradients of weights that every rank has whole; those that are sharded have been added up already."""
    own = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    for parameter in own:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if own:
        world.add_up([p.grad for p in own if p.grad is not None])
