"""Memory of an update, part by part, from counts of the model: arithmetic, without PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# As in real_kernels.head, which brings PyTorch along; a test holds them equal.
CHUNK_BYTES = 256 * 2**20
TRITON_CHUNK_BYTES = 2**30


@dataclass(frozen=True)
class ModelSizes:
    """Parameter counts and what a token keeps.

    Attributes:
        parameters: All of them, a tied head once.
        layer: Those of one layer (all layers are taken to be alike).
        head: Those of the lm_head.
        tied: Whether the head is the embedding.
        layers: Number of layers.
        layer_bytes: Activations that one layer keeps for the backward pass, bytes per token.
        other_bytes: Activations outside the layers, bytes per token.
        boundary_bytes: A layer's input, which is all that activation checkpointing keeps of a layer, bytes per token.
        kv_width: Key and value numbers of one token in one layer.
        hidden: Width of the hidden states.
    """

    parameters: int
    layer: int
    head: int
    tied: bool
    layers: int
    layer_bytes: float
    other_bytes: float
    boundary_bytes: float
    kv_width: int
    hidden: int

    @classmethod
    def of(cls, config: Any, precision: str = "bf16") -> ModelSizes:
        """Count by building the model without weights and running it on fake tensors.

        Args:
            config: A Transformers config of a causal language model.
            precision: "bf16" (autocast over fp32 weights) or "fp32".
        """
        from real_fast.planning import count

        return cls(**count.sizes(config, precision))


@dataclass(frozen=True)
class UpdateMemory:
    """Bytes on one device during the update.

    Attributes:
        weights: Master weights.
        gradients: Their gradients.
        moments: AdamW's two moments.
        copies: 16-bit copies of weights that autocast (or gathering a sharded layer) makes.
        activations: What the forward pass keeps for the backward pass.
        head: A chunk of logits, the head's gradient, the hidden states' gradient.
        reference: The frozen copy of the weights that the KL is measured from.
    """

    weights: float
    gradients: float
    moments: float
    copies: float
    activations: float
    head: float
    reference: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        held = self.weights + self.gradients + self.moments + self.reference
        return held + self.copies + self.activations + self.head


def update_memory(
    sizes: ModelSizes,
    tokens: int,
    *,
    head_rows: int,
    precision: str = "bf16",
    checkpointing: bool = False,
    gpus: int = 1,
    repeated_keys: int = 0,
    kl: bool = False,
) -> UpdateMemory:
    """Peak of an update: in the forward pass of a micro-batch that is not the update's first.

    Args:
        sizes: The model's.
        tokens: Tokens of a micro-batch.
        head_rows: Rows of it that go through the head.
        precision: "bf16" or "fp32".
        checkpointing: Activation checkpointing: layer inputs are kept, and one layer's activations at a time.
        gpus: Weights, gradients and moments are sharded over so many, and layers gathered one ahead.
        repeated_keys: Keys that a varlen kernel sees beyond the micro-batch's own tokens.
        kl: Whether the KL is in the loss; a copy for measuring alone waits in the host's memory.
    """
    half = precision == "bf16"
    p = sizes.parameters
    width = 2.0 if half else 4.0
    gathered = width * (2 * sizes.layer + sizes.head)
    copies = gathered if gpus > 1 else width * p * half
    layer = sizes.layer_bytes * tokens + width * sizes.kv_width * repeated_keys
    kept = sizes.layers * sizes.boundary_bytes * tokens + layer if checkpointing else sizes.layers * layer
    vocabulary = sizes.head / sizes.hidden
    if half:  # Triton's kernels: kept logits in 16 bits, 2 % more for what each tile leaves per row
        logits = 2.0 * vocabulary * head_rows
        # Several chunks sum dW in float32 before it is rounded; one writes it at once, and the backward pass scales it.
        gradients = (6.0 if logits > TRITON_CHUNK_BYTES else 4.0) * sizes.head
        chunk = 1.02 * min(TRITON_CHUNK_BYTES, logits)
    else:
        gradients, chunk = 4.0 * sizes.head, min(CHUNK_BYTES, 4.0 * vocabulary * head_rows)
    head = chunk + gradients + 2 * 4.0 * sizes.hidden * head_rows
    return UpdateMemory(
        weights=4.0 * p / gpus,
        gradients=4.0 * p / gpus,
        moments=8.0 * p / gpus,
        copies=copies,
        activations=kept + sizes.other_bytes * tokens,
        head=head,
        # Linear layers in 16 bits; the embedding in float32, see real_fast.reference.
        reference=kl * (width * p + (4.0 - width) * sizes.head) / gpus,
    )


def largest(fits: Callable[[int], bool], limit: int = 2**20) -> int:
    """The largest number up to `limit` that fits, 0 if none does; what fits also fits with less."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
