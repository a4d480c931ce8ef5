"""The reference: the policy as the RL phase starts, frozen, which the KL divergence is measured from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from real_fast.errors import CheckpointError
from real_fast.model.policy import Policy
from real_fast.runs.checkpoint import load_tensors, save_tensors
from real_fast.types import Batch
from real_kernels import HeadOptions, linear_logprob

FOLDER = "reference"


class RefPolicy:
    """A frozen copy of a policy in the precision that it computes in.

    It is written into the run's folder before the first update and read from there on resume, so that nothing that
    happens to the start weights in the meantime, nor an interrupted warm-up, can change what a resumed run is held to.

    Args:
        policy: The policy, as it is now.
        temperature: Sampling temperature of the feedback.
        resident: Keep the copy on the policy's device; otherwise it waits in the host's memory between uses, which are
            before an update's forward passes, so that it adds nothing to the update's peak.
    """

    def __init__(self, policy: Policy, temperature: float, resident: bool) -> None:
        self.temperature = temperature
        self.device = policy.device
        self.home = self.device if resident else torch.device("cpu")
        self.policy = frozen_copy(policy, self.home)

    @torch.no_grad()
    def logprobs(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """[N] log-probabilities of each micro-batch's sampled tokens, by one forward pass without gradients each."""

        def of_targets(hidden: torch.Tensor, weight: torch.Tensor, batch: Batch) -> torch.Tensor:
            rows = hidden[batch.rows]
            return linear_logprob(
                rows, weight, batch.targets, head=HeadOptions(temperature=self.temperature, validate=False)
            )

        self.policy.to(self.device)
        found = [self.policy(batch, of_targets) for batch in batches]
        self.policy.to(self.home)
        return found

    def save(self, run: Path) -> None:
        """Write the weights into a run's folder. Raises :class:`CheckpointError`."""
        save_tensors(run / FOLDER, dict(self.policy.model.named_parameters()))

    @torch.no_grad()
    def load(self, run: Path) -> None:
        """Take the weights that :meth:`save` wrote.

        Raises:
            CheckpointError: There are none, or they are another model's.
        """
        tensors = load_tensors(run / FOLDER)
        if tensors is None:
            raise CheckpointError(
                f"{run / FOLDER} does not exist: the run was started without the KL divergence, and where it started "
                "from is not known any more: resume with objective.kl_coef 0, objective.kl_every 0 and "
                "--allow-changed, or start over"
            )
        own = dict(self.policy.model.named_parameters())
        if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in own.items()}:
            raise CheckpointError(f"{run / FOLDER} holds the weights of another model")
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def frozen_copy(policy: Policy, device: torch.device) -> Policy:
    """A copy without gradients, in evaluation mode, that gives the policy's own log-probabilities to the last bit.

    What the policy computes in 16 bits is kept in 16 bits: the linear layers' weights, which autocast rounds for every
    product. Embedding and norms, whose float32 values the policy uses, stay as they are.

    Args:
        policy: The policy.
        device: Where the copy lives.
    """
    model, half = policy.model, policy.autocast_dtype
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    # The head's product is in 16 bits on CUDA alone, see Policy.forward; a tied weight is the embedding.
    whole = {id(embedding.weight)} | (set() if policy.device.type == "cuda" else {id(head.weight)})
    # deepcopy() takes a parameter's copy from here: none in float32 is made on the way.
    copies: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in copies:
                continue
            rounded = half is not None and isinstance(module, nn.Linear) and id(parameter) not in whole
            dtype = half if rounded else parameter.dtype
            tensor = parameter.detach().to(device, dtype, copy=True)
            copies[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
    found = copy.deepcopy(policy, copies).to(device).eval()
    found.work = None  # it computes with the weights that it has
    return found
