"""The reference: the policy as the RL phase starts, frozen, which the KL divergence is measured from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from real_fast.distributed.shard import local, whole
from real_fast.distributed.world import ALONE, World
from real_fast.errors import CheckpointError
from real_fast.model.lora import adapter_state, adapters_off, change_nothing, other_adapters
from real_fast.model.policy import Policy
from real_fast.model.precision import rounded_weights
from real_fast.model.sharded import frozen_copy_of_spread
from real_fast.model.waiting import Waiting
from real_fast.runs.checkpoint import open_tensors, save_tensors
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
        device = policy.device
        moves = not resident and device.type != "cpu"
        if policy.spread is None:
            self.policy = frozen_copy(policy, torch.device("cpu") if moves else device)
        else:
            self.policy = frozen_copy_of_spread(policy)
        self.waiting = Waiting(self._tensors, device, policy.spread is not None) if moves else None

    def _tensors(self) -> list[torch.Tensor]:
        """What moves: of a spread policy, this rank's slices."""
        if self.policy.spread is None:
            return [*self.policy.parameters(), *self.policy.buffers()]
        return [local(parameter) for parameter in self.policy.parameters()]

    @torch.no_grad()
    def logprobs(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """[N] log-probabilities of each micro-batch's sampled tokens, by one forward pass without gradients each."""
        with self._there():
            return [self.policy(batch, _of_targets(self.temperature)) for batch in batches]

    @contextmanager
    def _there(self) -> Iterator[None]:
        """Inside, it is on the device that it computes on."""
        if self.waiting is not None:
            self.waiting.come()
        try:
            yield
        finally:
            if self.waiting is not None:
                self.waiting.leave()

    def save(self, run: Path, world: World = ALONE) -> None:
        """Write the weights into a run's folder; all ranks call this. Raises :class:`CheckpointError`."""
        with self._there():
            tensors = ((name, whole(parameter)) for name, parameter in self.policy.model.named_parameters())
            save_tensors(run / FOLDER, tensors, world)

    @torch.no_grad()
    def load(self, run: Path, check: bool = True) -> None:
        """Take the weights that :meth:`save` wrote.

        Args:
            run: The run's folder.
            check: Read all of it for its checksums, which one rank does for all.

        Raises:
            CheckpointError: There are none, or they are another model's.
        """
        with self._there():
            own = dict(self.policy.model.named_parameters())
            for name, tensor in _read(run, own, check).items():
                local(own[name]).copy_(tensor)
            if self.waiting is not None:
                self.waiting.keep()


class RefAdapters:
    """The reference of a policy that trains adapters: the policy itself with others in their place, and no copy of it.

    Adapters that start the phase without having been trained change nothing, and are switched off; otherwise, after a
    warm-up or behind another run, those that the phase started with take the present ones' place.

    Args:
        policy: The policy, as it is now.
        temperature: Sampling temperature of the feedback.
    """

    def __init__(self, policy: Policy, temperature: float) -> None:
        self.policy, self.temperature = policy, temperature
        self.state = self._kept(adapter_state(policy.model))

    def _kept(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        return None if change_nothing(state) else state

    @torch.no_grad()
    def logprobs(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """As :meth:`RefPolicy.logprobs`."""
        policy, model = self.policy, self.policy.model
        training = policy.training
        policy.eval()
        with adapters_off(model) if self.state is None else other_adapters(model, self.state):
            found = [policy(batch, _of_targets(self.temperature)) for batch in batches]
        policy.train(training)
        return found

    def save(self, run: Path, world: World = ALONE) -> None:
        """Write the adapters into a run's folder. Raises :class:`CheckpointError`."""
        tensors = adapter_state(self.policy.model) if self.state is None else self.state
        save_tensors(run / FOLDER, tensors.items(), world)

    def load(self, run: Path, check: bool = True) -> None:
        """Take the adapters that :meth:`save` wrote. Raises :class:`CheckpointError`, as :meth:`RefPolicy.load`."""
        own = adapter_state(self.policy.model)
        device = self.policy.model.device
        self.state = self._kept({name: tensor.to(device) for name, tensor in _read(run, own, check).items()})


def _of_targets(temperature: float) -> Callable[[torch.Tensor, torch.Tensor, Batch], torch.Tensor]:
    """[N] log-probabilities of a batch's sampled tokens, as a policy computes a loss."""

    def logprobs(hidden: torch.Tensor, weight: torch.Tensor, batch: Batch) -> torch.Tensor:
        head = HeadOptions(temperature=temperature, validate=False)
        return linear_logprob(hidden[batch.rows], weight, batch.targets, head=head)

    return logprobs


def _read(run: Path, own: Mapping[str, torch.Tensor], check: bool) -> dict[str, torch.Tensor]:
    """This rank's part of the reference's weights in a run's folder, like `own`. Raises CheckpointError."""
    tensors = open_tensors(run / FOLDER, check)
    if tensors is None:
        raise CheckpointError(
            f"{run / FOLDER} does not exist: bring it back from a copy if it was there; a run that was started without "
            "the KL divergence has none, and where it started from is not known any more: resume with "
            "objective.kl_coef 0, objective.kl_every 0 and --allow-changed, or start over"
        )
    if {k: tensors.shape(k) for k in tensors.names} != {k: tuple(v.shape) for k, v in own.items()}:
        raise CheckpointError(f"{run / FOLDER} holds the weights of another model")
    return {name: tensors.local(name, tensor) for name, tensor in own.items()}


def frozen_copy(policy: Policy, device: torch.device) -> Policy:
    """A copy without gradients, in evaluation mode, that gives the policy's own log-probabilities to the last bit.

    What the policy computes in 16 bits is kept in 16 bits: the linear layers' weights, which autocast rounds for every
    product. Embedding and norms, whose float32 values the policy uses, stay as they are.

    Args:
        policy: The policy.
        device: Where the copy lives.
    """
    model, half = policy.model, policy.autocast_dtype
    rounded = rounded_weights(model, half, policy.device)
    # deepcopy() takes a parameter's copy from here: none in float32 is made on the way.
    copies: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in copies:
                continue
            dtype = half if id(parameter) in rounded else parameter.dtype
            tensor = parameter.detach().to(device, dtype, copy=True)
            copies[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
    copies[id(policy.work)] = copies[id(policy.faster)] = None  # it computes with the weights that it has
    found = copy.deepcopy(policy, copies).to(device).eval()
    found.faster = policy.faster and policy.faster.of(found.model)
    return found
