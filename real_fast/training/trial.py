"""Tries ``train.compile`` and ``train.liger`` on a small batch against the model's own layers, before work starts."""

from __future__ import annotations

import logging
import time

import torch

from real_fast.batching.micro_batches import micro_batches
from real_fast.errors import ConfigError
from real_fast.model.policy import Policy
from real_fast.runs.progress import show
from real_fast.types import Batch, Group, Rollout

logger = logging.getLogger(__name__)

# Largest relative error of hidden states and of the embeddings' gradient; 16-bit products round about as much.
_BOUND = {"full": 1e-3, "half": 0.05}
# Prompt and response lengths of two groups, none of a length that would be taken for a constant.
_GROUPS = ((5, (3, 4)), (4, (2, 6)))


def check_faster(policy: Policy, pad_id: int) -> None:
    """Refuse faster layers that do not compute what the model's own do, or cannot be made here.

    Compiling takes its time here, and the first update finds it done.

    Args:
        policy: The policy, as it is trained.
        pad_id: Token id for padding.

    Raises:
        ConfigError: Hidden states or gradients differ by more than rounding, or the layers' code fails.
    """
    faster = policy.faster
    if faster is None:
        return
    (batch,) = micro_batches(_groups(policy.model.config.vocab_size), 10**6, pad_id, policy.attention is not None)
    batch = batch.to(policy.device)
    policy.faster = None
    want = _states_and_gradient(policy, batch)
    policy.faster, start = faster, time.monotonic()
    show(f"{faster.name}: trying the layers")
    try:
        found = _states_and_gradient(policy, batch)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # a compiler's and a kernel's own
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{faster.name} does not work for this model ({reason}): leave it out") from error
    half = torch.bfloat16 in {policy.autocast_dtype, policy.model.dtype}
    for what, a, b in zip(("hidden states", "gradients"), found, want, strict=True):
        off = float((a - b).norm() / b.norm())
        if not off <= _BOUND["half" if half else "full"]:
            raise ConfigError(f"{faster.name} changes this model's {what} by {off:.2g} of their size: leave it out")
    logger.info("%s: tried in %.0f s", faster.name, time.monotonic() - start)


def _groups(vocabulary: int) -> list[Group]:
    def ids(length: int, start: int) -> list[int]:
        return [(7 * i + start) % min(vocabulary, 997) for i in range(length)]

    return [
        Group(
            i,
            ids(prompt, 11 * (i + 1)),
            1.0,
            [Rollout(text := ids(n, 5 + n), [-1.0] * n, text, 0, "length", None, None) for n in responses],
        )
        for i, (prompt, responses) in enumerate(_GROUPS)
    ]


def _states_and_gradient(policy: Policy, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states, and the gradient at the embeddings' output of a weighted sum of them; weights' are not made."""
    embedded: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    training = policy.model.training
    policy.model.train()
    with policy.working():
        hook = policy.model.get_input_embeddings().register_forward_hook(keep)
        try:
            hidden = policy(batch, lambda hidden, weight, batch: hidden.float())
            direction = torch.linspace(-1.0, 1.0, hidden.shape[-1], device=hidden.device)
            (gradient,) = torch.autograd.grad((hidden * direction).sum(), embedded[0])
        finally:
            hook.remove()
            policy.model.train(training)
    return hidden.detach(), gradient.float()
