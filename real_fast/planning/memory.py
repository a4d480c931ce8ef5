"""Memory of an update, part by part, from counts of the model: arithmetic, without PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

# As in real_kernels.head, which brings PyTorch along; a test holds them equal.
CHUNK_BYTES = 256 * 2**20
TRITON_CHUNK_BYTES = 2**30

# Bytes of a weight in nf4: 4 bits, and a scale of 8 bits for 64 of them, and one of 32 bits for 256 of those.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# Bytes of both moments in 8 bits: blocks of 256 share a scale in float32.
MOMENTS_8BIT = 2 * (1 + 4 / 256)
# Bytes per number of the largest tensor that an 8-bit step holds for a moment: on a CPU, where it runs operation by
# operation (measured by benchmarks.plan_check), and compiled on a GPU (assumed: both moments in float32).
STEP_8BIT = {"cpu": 54.0, "cuda": 8.0}


@dataclass(frozen=True)
class Kept:
    """Activations that wait for the backward pass, bytes per token.

    Attributes:
        layer: Of one layer.
        other: Outside the layers.
        boundary: A layer's input, which is all that activation checkpointing keeps of a layer.
        rank: Of one layer's adapters, per rank.
    """

    layer: float
    other: float
    boundary: float
    rank: float = 0.0


@dataclass(frozen=True)
class ModelSizes:
    """Parameter counts and what a token keeps.

    Attributes:
        parameters: All of them, a tied head once.
        layer: Those of one layer (all layers are taken to be alike).
        head: Those of the lm_head, as many as of the embedding.
        tied: Whether the head is the embedding.
        layers: Number of layers.
        targets: Of the body's linear layers by their last name, inputs and outputs of all of them together: an adapter
            of rank r has r times as many parameters.
        linear: Weights of the body's linear layers, biases not counted.
        largest: Weights of the largest of them.
        kv_width: Key and value numbers of one token in one layer.
        hidden: Width of the hidden states.
        kept: Activations by :attr:`Training.mode`.
        window: Positions that a token sees in some layer or in all; None for every one in all.
    """

    parameters: int
    layer: int
    head: int
    tied: bool
    layers: int
    targets: Mapping[str, int]
    linear: int
    largest: int
    kv_width: int
    hidden: int
    kept: Mapping[str, Kept]
    window: int | None = None

    @classmethod
    def of(cls, config: Any) -> ModelSizes:
        """Count by building the model without weights and running it on fake tensors.

        Args:
            config: A Transformers config of a causal language model.
        """
        from real_fast.planning import count

        return cls.read(count.sizes(config))

    @classmethod
    def read(cls, counted: Mapping[str, Any]) -> ModelSizes:
        """From what :func:`real_fast.planning.count.sizes` gives, or JSON of it."""
        return cls(**{**counted, "kept": {mode: Kept(**kept) for mode, kept in counted["kept"].items()}})


@dataclass(frozen=True)
class Training:
    """What of the settings decides the memory of weights, gradients and optimiser.

    Attributes:
        precision: Of matrix products.
        weights: What trained weights are kept in.
        rank: r of adapters; 0 trains all weights.
        targets: The linear layers that have one; empty for all.
        nf4: Whether the weights under adapters are in 4 bits.
        optimizer: As ``optim.name``.
        offload: As ``optim.offload``.
        fused_head: Whether a GPU adds the head's gradient to the float32 one itself.
        liger: Whether Liger's kernels keep less of a layer.
        device: What it runs on: a CPU computes the head in float32, and adds up its gradient by autograd.
    """

    precision: Literal["bf16", "fp32"] = "bf16"
    weights: Literal["fp32", "bf16"] = "fp32"
    rank: int = 0
    targets: tuple[str, ...] = ()
    nf4: bool = False
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    offload: Literal["none", "moments", "all"] = "none"
    fused_head: bool = True
    liger: bool = False
    device: Literal["cuda", "cpu"] = "cuda"

    @property
    def mode(self) -> str:
        """Under which activations are counted."""
        adapters, weights = " adapters" * bool(self.rank), " weights" * (self.weights == "bf16" and not self.rank)
        precision = "bf16" if weights else self.precision
        return precision + adapters + weights + " liger" * self.liger

    def adapters(self, sizes: ModelSizes) -> int:
        """Parameters of the adapters."""
        return self.rank * sum(n for name, n in sizes.targets.items() if not self.targets or name in self.targets)


@dataclass(frozen=True)
class UpdateMemory:
    """Bytes on one device during the update.

    Attributes:
        weights: Trained weights, or those under adapters and the adapters.
        gradients: Their gradients.
        moments: AdamW's two moments.
        copies: 16-bit copies of weights that the update makes; of sharded ones, what is gathered of them at a time.
        activations: What the forward pass keeps for the backward pass.
        head: A chunk of logits, the head's gradient, the hidden states' gradient.
        reference: The frozen copy of the weights that the KL is measured from.
        step: What the optimiser's step takes for a moment, when copies, activations and head are gone.
        summed: A unit's whole gradient, before ranks have added it up and kept a part each.
    """

    weights: float
    gradients: float
    moments: float
    copies: float
    activations: float
    head: float
    reference: float = 0.0
    step: float = 0.0
    summed: float = 0.0

    @property
    def held(self) -> float:
        """What is there all along, while feedback is sampled too."""
        return self.weights + self.moments + self.reference

    @property
    def total(self) -> float:
        """The peak."""
        return self.held + self.gradients + max(self.copies + self.activations + self.head + self.summed, self.step)


def update_memory(
    sizes: ModelSizes,
    tokens: int,
    training: Training = Training(),
    *,
    head_rows: int,
    checkpointing: bool = False,
    gpus: int = 1,
    replicas: int = 1,
    repeated_keys: int = 0,
    kl: bool = False,
) -> UpdateMemory:
    """Peak of an update: in the forward pass of a micro-batch that is not the update's first, or in the step.

    Args:
        sizes: The model's.
        tokens: Tokens of a micro-batch.
        training: What is trained, and how.
        head_rows: Rows of it that go through the head.
        checkpointing: Activation checkpointing: layer inputs are kept, and one layer's activations at a time.
        gpus: Weights, gradients and moments are sharded over so many by FSDP2, which gathers layers one ahead.
        replicas: Copies of the sharded model, over as many GPUs each.
        repeated_keys: Keys that a varlen kernel sees beyond the micro-batch's own tokens, under a window alone.
        kl: Whether the KL is in the loss; a copy for measuring alone waits on the host, and adapters need none.
    """
    t, p = training, sizes.parameters
    half, adapters = t.precision == "bf16", training.adapters(sizes)
    width = 2.0 if half else 4.0
    own = 2.0 if t.weights == "bf16" and not t.rank else 4.0
    trained = adapters or p
    weights, frozen = own * trained, _under_adapters(sizes, t) if t.rank else 0.0
    on_host = t.offload == "all" and not t.rank
    # The head's gradient is added up on the device, whatever the others are.
    gradients = 4.0 * sizes.head * (t.device == "cuda") if on_host else own * trained
    per_weight = MOMENTS_8BIT if t.optimizer == "adamw8bit" else 2 * own
    copies, summed, shards, mode = _copies(sizes, t, adapters), 0.0, gpus // replicas, t.mode
    if gpus > 1:
        copies = _gathered(sizes, t, adapters)
        if not t.rank:
            # In the precision of the products, as autograd makes it, and in float32, as it is sent. The head's waits
            # for the end of the backward pass.
            summed = max(width * sizes.head + (width + 4.0) * sizes.layer, (width + 4.0) * sizes.head)
        t = replace(t, fused_head=True)
    # Every rank has all of the adapters.
    parts = 1 if t.rank else shards
    kept = sizes.kept.get(mode) or sizes.kept[mode.removesuffix(" liger")]  # where Liger has no kernels
    layer = (kept.layer + kept.rank * t.rank) * tokens + width * sizes.kv_width * repeated_keys
    activations = sizes.layers * kept.boundary * tokens + layer if checkpointing else sizes.layers * layer
    return UpdateMemory(
        weights=0.0 if on_host else weights / parts + frozen / shards,
        gradients=gradients / parts,
        moments=(t.offload == "none") * per_weight * trained / parts,
        copies=copies,
        activations=activations + kept.other * tokens,
        head=_head(sizes, t, head_rows),
        # Linear layers in 16 bits; the embedding in float32, see real_fast.model.ref_policy. Slices are all in float32.
        reference=(kl and not t.rank) * (4.0 * p if gpus > 1 else width * p + (4.0 - width) * sizes.head) / shards,
        step=_step(sizes, t, per_weight, trained) / parts,
        summed=summed,
    )


def host_memory(sizes: ModelSizes, t: Training) -> float:
    """Bytes of ``optim.offload`` in the host's memory."""
    own = 2.0 if t.weights == "bf16" and not t.rank else 4.0
    per_weight = MOMENTS_8BIT if t.optimizer == "adamw8bit" else 2 * own
    trained = t.adapters(sizes) or sizes.parameters
    return trained * ((t.offload != "none") * per_weight + (t.offload == "all" and not t.rank) * 2 * own)


def _under_adapters(sizes: ModelSizes, t: Training) -> float:
    """Bytes of the frozen weights: in what they compute in; norms, the embedding and a tied head in float32."""
    linear = NF4 if t.nf4 else 2.0 if t.precision == "bf16" else 4.0
    head = 0 if sizes.tied else sizes.head
    of_head = 2.0 if t.precision == "bf16" and t.device == "cuda" else 4.0
    return linear * sizes.linear + of_head * head + 4.0 * (sizes.parameters - sizes.linear - head)


def _copies(sizes: ModelSizes, t: Training, adapters: int) -> float:
    """Bytes of what an update computes with in place of the weights, see real_fast.model.masters."""
    half, on_gpu = t.precision == "bf16", t.device == "cuda"
    if t.rank:
        # A tied weight is copied for the loss, since it is in float32; nf4 is unpacked a layer at a time.
        head = 2.0 * sizes.head * (sizes.tied and half and on_gpu)
        return 2.0 * adapters * half + head + 2.0 * sizes.largest * t.nf4
    head = 2.0 * sizes.head if half and on_gpu else 0.0
    if t.offload == "all":
        others = sizes.parameters - sizes.linear - (0 if sizes.tied else sizes.head)
        whole = 0.0 if head or sizes.tied else 4.0 * sizes.head
        return (2.0 if half else 4.0) * sizes.linear + 4.0 * others + head + whole
    return (2.0 * sizes.linear + head) * (half and t.weights == "fp32")


def _gathered(sizes: ModelSizes, t: Training, adapters: int) -> float:
    """Bytes of weights that are whole at a time: the layer that is computed, the next, the head and the embedding."""
    half = t.precision == "bf16"
    width, embedding = 2.0 if half else 4.0, 0 if sizes.tied else sizes.head
    if not t.rank:
        return width * (2 * sizes.layer + sizes.head + embedding)
    # The embedding and a tied head are kept in float32; the latter, and the adapters, are copied too.
    head = (4.0 + 2.0 * half) if sizes.tied else width
    return width * 2 * sizes.layer + head * sizes.head + 4.0 * embedding + 2.0 * adapters * half


def _head(sizes: ModelSizes, t: Training, rows: int) -> float:
    """Bytes that the head takes for so many rows."""
    vocabulary = sizes.head / sizes.hidden
    if t.precision == "bf16" and t.device == "cuda":
        # Triton's kernels: kept logits in 16 bits, 2 % more for what each tile leaves per row.
        logits = 2.0 * vocabulary * rows
        chunk = 1.02 * min(TRITON_CHUNK_BYTES, logits)
        # Added to the float32 gradient itself. Else several chunks sum dW in float32 before it is rounded, and one
        # writes it at once, and the backward pass scales it.
        alone = not t.rank and not (t.fused_head and t.weights == "fp32")
        gradient = (6.0 if logits > TRITON_CHUNK_BYTES else 4.0) * sizes.head * alone
    else:
        chunk = min(CHUNK_BYTES, 4.0 * vocabulary * rows)
        gradient = 0.0 if t.rank or t.device == "cuda" else 4.0 * sizes.head
    return chunk + gradient + 2 * 4.0 * sizes.hidden * rows


def _step(sizes: ModelSizes, t: Training, per_weight: float, trained: float) -> float:
    """Bytes that the optimiser's step takes for the largest trained tensor."""
    if t.offload == "all":
        return 0.0
    largest = min(trained, sizes.head if not t.rank else t.rank * max(sizes.targets.values()) / sizes.layers)
    moved = per_weight * largest * (t.offload == "moments" and t.device == "cuda")
    return float(moved + (STEP_8BIT[t.device] * largest if t.optimizer == "adamw8bit" else 0.0))


def largest(fits: Callable[[int], bool], limit: int = 2**20) -> int:
    """The largest number up to `limit` that fits, 0 if none does; what fits also fits with less."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
