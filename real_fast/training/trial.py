"""Tries ``train.compile`` and ``train.liger`` on a small batch against the model's own layers, before work starts."""

from __future__ import annotations

import logging
import subprocess
import time

import torch

from real_fast.batching.micro_batches import micro_batches
from real_fast.errors import ConfigError
from real_fast.model.policy import Policy
from real_fast.types import Batch, Group, Rollout

logger = logging.getLogger(__name__)

# Largest relative error of hidden states and gradients. In 16 bits two right ways are up to 0.05 apart behind 30 layers
# (SmolLM2), and a wrong one by about its whole size.
_BOUND = {"full": 1e-3, "half": 0.2}
# Prompt and response lengths of two groups, none of a length that would be taken for a constant.
_GROUPS = ((5, (3, 4)), (4, (2, 6)))


def check_faster(policy: Policy, pad_id: int) -> None:
    """Refuse faster layers that do not compute what the model's own do, or cannot be made here.

    Most of the compiling is done here, where nothing waits for it yet.

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
    try:
        found = _states_and_gradient(policy, batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's and a kernel's own, of any kind
        logger.debug("%s failed", faster.name, exc_info=True)
        raise ConfigError(
            f"{faster.name} does not work for this model on this machine ({_reason(error)}): leave it out"
        ) from error
    half = torch.bfloat16 in {policy.autocast_dtype, policy.model.dtype}
    for what, a, b in zip(("hidden states", "gradients"), found, want, strict=True):
        off = float((a - b).norm() / b.norm())
        if not off <= _BOUND["half" if half else "full"]:
            raise ConfigError(f"{faster.name} changes this model's {what} by {off:.2g} of their size: leave it out")
    logger.info("%s: tried in %.0f s", faster.name, time.monotonic() - start)


def _reason(error: BaseException) -> str:
    """One line: a compiler's message where there is one among the causes, else the innermost of them."""
    causes = [error]
    while (inner := causes[-1].__cause__ or getattr(causes[-1], "inner_exception", None)) is not None:
        causes.append(inner)
    for cause in reversed(causes):
        for line in str(cause).splitlines():
            if "error:" in line and not isinstance(cause, subprocess.CalledProcessError):  # whose text is the command
                return f"{type(cause).__name__}: {line.strip()[:300]}"
    said = str(causes[-1]).strip().splitlines() or ["no reason given"]
    return f"{type(causes[-1]).__name__}: {said[0][:300]}"


def _groups(vocabulary: int) -> list[Group]:
    def ids(length: int, start: int) -> list[int]:
        return [(7 * i + start) % min(vocabulary, 997) for i in range(length)]

    def rollout(length: int) -> Rollout:
        text = ids(length, 5 + length)
        return Rollout(text, [-1.0] * length, text, 0, "length", None, None)

    return [
        Group(i, ids(prompt, 11 * (i + 1)), 1.0, [rollout(n) for n in responses])
        for i, (prompt, responses) in enumerate(_GROUPS)
    ]


def _states_and_gradient(policy: Policy, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states, and the gradient of a weighted sum of them: at the embeddings' output, or of the adapters.

    None of a weight's size is made, nor left behind.
    """
    model, embedded = policy.model, list[torch.Tensor]()
    embeddings = model.get_input_embeddings()

    def keep(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    all_trained = next(embeddings.parameters()).requires_grad
    training = model.training
    had = {id(p) for p in model.parameters() if p.grad is not None}
    hook = embeddings.register_forward_hook(keep) if all_trained else None
    model.train()
    try:
        with policy.working():
            hidden = policy(batch, lambda hidden, weight, batch: hidden.float())
            direction = torch.linspace(-1.0, 1.0, hidden.shape[-1], device=hidden.device)
            at = embedded[:1] if all_trained else [p for p in model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad((hidden * direction).sum(), at, allow_unused=True)
    finally:
        if hook is not None:
            hook.remove()
        model.train(training)
        for parameter in model.parameters():  # the head's sum, which the step begins with
            if id(parameter) not in had:
                parameter.grad = None
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(at, gradients, strict=True)]
    return hidden.detach(), torch.cat([g.float().flatten() for g in found])
