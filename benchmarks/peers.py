"""What others have for the loss that the head is timed on: the mean cross-entropy of N rows.

A peer is a factory: given hidden states [N, D], weight [V, D] and targets [N] it returns ``loss()``. Nothing is
imported before a peer is asked for; `absent` says why one does not run here. TRL 1.16 and Liger 0.8.5 are installed for
the tests; CCE (apple/ml-cross-entropy, 3a79837), QuACK (c7cbcb3) and verl (verl-project/verl, 04fb04c) are called as
their source has it, whose signatures `tests/benchmarks/test_peers.py` holds the calls to.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

Loss = Callable[[], torch.Tensor]
Factory = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Loss]
NOT_INSTALLED = "not installed"


class Peer(NamedTuple):
    """A contender of others.

    Attributes:
        make: See the module.
        absent: Given a device, why it does not run there; "" if it does.
        label: For tables.
        rows: What N must be a multiple of.
        vocabulary: What V must be a multiple of.
        bf16: Whether it takes bfloat16 alone.
    """

    make: Factory
    absent: Callable[[torch.device], str]
    label: str
    rows: int = 1
    vocabulary: int = 1
    bf16: bool = False


def cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """By full logits."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def _eager(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Loss:
    """Full logits, as most trainers have them."""
    return lambda: cross_entropy(hidden, weight, targets)


def _compiled(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Loss:
    """The same, compiled for this shape."""
    torch._dynamo.reset()  # after eight shapes it would silently stop compiling
    compiled = torch.compile(cross_entropy, dynamic=False)
    return lambda: compiled(hidden, weight, targets)


def _torch_chunked(budget: int | None, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Loss:
    """PyTorch's own, with the chunks that it picks itself (a few rows), or with those of a budget such as ours."""
    function: Any = F
    rows = None if budget is None else max(1, budget // (4 * weight.shape[0]))
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return lambda: function.linear_cross_entropy(hidden, weight, targets, options=options)


def _trl(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Loss:
    """TRL's head of its GRPO, AsyncGRPO and SFT trainers: tiles of 4096 rows by 32,768 tokens, 8 N D V FLOPs."""
    function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    columns = 32_768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE, whose module imports the trainers
    # Bias, temperature, columns, soft-cap, scale of the logits, what else is wanted of each row.
    rest = (1.0, columns, None, 1.0, ())
    return lambda: -function.apply(hidden, weight, None, targets, *rest)[0].mean()


def _liger(accumulator: torch.dtype | None, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Loss:
    """Liger's; by default it accumulates dW over chunks in the weight's own dtype."""
    module = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(
        accum_dtype=accumulator
    )
    return lambda: module(weight, hidden, targets)


def _liger_scaled(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Loss:
    """Liger's loss per token, whose factor comes with the backward pass; on Hopper a CuTe kernel, PyTorch elsewhere."""
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = module.LigerFusedLinearScaledCrossEntropyFunction
    return lambda: function.apply(hidden, weight, targets).mean()


def _liger_sm90(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Loss:
    """Liger's CuTe kernel for Hopper, which keeps all logits in bfloat16."""
    module = importlib.import_module("liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90")
    return lambda: module.liger_fused_linear_cross_entropy_sm90(hidden, weight, targets)


def _liger_grpo(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Loss:
    """Liger's policy gradient: with CISPO, advantage 1 and no KL it is -sum(log p) / N.

    One sequence of N tokens, which is the fewest chunks. The step from log-probabilities to the loss, N numbers, is not
    compiled: Liger would compile it anew in each call. It computes gradients whether they are asked for or not.
    """
    module = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, loss_type="cispo", epsilon_high=5.0
    )
    mask = torch.ones(1, targets.shape[0], device=hidden.device)
    advantages = torch.ones(1, device=hidden.device)
    return lambda: module(hidden[None], weight, targets[None], mask, advantages)[0]


def _cce(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Loss:
    """Apple's, with its default filter of small gradients."""
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda: function(hidden, weight, targets)


def _quack(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Loss:
    """QuACK's, chunks of 4096 rows, tuned; on Hopper it picks its newer pipeline itself."""
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda: function(hidden, weight, targets)


def _verl(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Loss:
    """verl's Triton head: log-probabilities and entropies; temperature 1, no reduction."""
    function = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return lambda: -function(hidden, weight, targets, 1.0, "none")[0].mean()


def _here(_: torch.device) -> str:
    return ""


def _package(module: str, package: str, needs: str = "") -> Callable[[torch.device], str]:
    """Why a peer of a package does not run: `needs` names what only a CUDA device has."""

    def absent(device: torch.device) -> str:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            return f"{NOT_INSTALLED}: pip install --no-deps {package}"
        if needs and device.type != "cuda":
            return f"{needs}: needs a CUDA device"
        if "SM90" in needs and torch.cuda.get_device_capability(device) != (9, 0):
            return f"{needs}: needs a GPU of compute capability 9.0"
        return _broken.get(module) or _import_error(module, package)

    return absent


# By module, why it does not import: to try takes seconds, and reasons are asked for at every shape.
_broken: dict[str, str] = {}


def _import_error(module: str, package: str) -> str:
    try:
        importlib.import_module(module)
    except Exception as error:  # a package that breaks on import, too, is only left out
        first = (str(error).splitlines() or [""])[0]
        _broken[module] = f"{package} does not import here: {type(error).__name__}: {first}"
        return _broken[module]
    return ""


def _no_torch_chunked(_: torch.device) -> str:
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return ""
    return f"{NOT_INSTALLED}: torch {torch.__version__} has no chunked linear_cross_entropy"


@cache
def _no_compiler(device: torch.device) -> str:
    """Why torch.compile does not work here, by trying it: a compiler, its headers and Triton may each be missing."""
    try:
        torch.compile(lambda x: x.sin().cos(), dynamic=False)(torch.ones(64, device=device))
    except Exception as error:  # whatever a missing compiler raises
        return f"torch.compile does not work here: {(str(error).splitlines() or [''])[0]}"
    return ""


def _no_scaled(device: torch.device) -> str:
    """Liger's scaled loss takes its CuTe kernels on Hopper, and never goes without them there."""
    reason = _package(_SCALED, "liger-kernel")(device)
    on_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    if reason or not on_hopper:
        return reason
    return _package(f"{_CUTE}.fused_scaled_cross_entropy_sm90", "liger-kernel[cutedsl]")(device)


_LIGER = ("liger_kernel.transformers", "liger-kernel", "Triton kernels")
_SCALED = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
_CUTE = "liger_kernel.ops.cutedsl.ops"
PEERS = {
    "eager": Peer(_eager, _here, "eager, full logits"),
    "torch.compile": Peer(_compiled, _no_compiler, "torch.compile, full logits"),
    "torch linear_cross_entropy": Peer(
        partial(_torch_chunked, None), _no_torch_chunked, "torch `linear_cross_entropy`"
    ),
    "torch linear_cross_entropy, 256 MiB": Peer(
        partial(_torch_chunked, 256 * 2**20), _no_torch_chunked, "torch `linear_cross_entropy`, 256 MiB chunks"
    ),
    "trl chunked": Peer(_trl, _package("trl.kernels", "trl"), "TRL chunked log-probabilities"),
    "liger": Peer(partial(_liger, None), _package(*_LIGER), "Liger fused CE"),
    "liger, fp32 dW": Peer(partial(_liger, torch.float32), _package(*_LIGER), "Liger fused CE, dW summed in fp32"),
    "liger scaled": Peer(_liger_scaled, _no_scaled, "Liger scaled CE"),
    "liger sm90": Peer(
        _liger_sm90,
        _package(f"{_CUTE}.fused_linear_cross_entropy_sm90", "liger-kernel[cutedsl]", "CuTe DSL kernels for SM90"),
        "Liger fused CE, SM90",
        rows=128,
        vocabulary=256,
        bf16=True,
    ),
    "liger grpo": Peer(_liger_grpo, _package("liger_kernel.chunked_loss", "liger-kernel"), "Liger chunked GRPO"),
    # Its torch_compile implementation, the one for the CPU, is our contender "torch.compile" once more.
    "cce": Peer(_cce, _package("cut_cross_entropy", "cut-cross-entropy", "Triton kernels"), "CCE"),
    "quack": Peer(_quack, _package("quack.linear_cross_entropy", "quack-kernels", "CuTe DSL kernels"), "QuACK", rows=8),
    "verl": Peer(
        _verl, _package("verl.utils.kernel.linear_cross_entropy", "verl", "Triton kernels"), "verl Triton head"
    ),
}


def unsuitable(name: str, n: int, v: int, dtype: torch.dtype) -> str:
    """Why a peer does not take a shape, or ""."""
    peer = PEERS.get(name)
    if peer is None:
        return ""
    if n % peer.rows or v % peer.vocabulary:
        return f"takes multiples of {peer.rows} rows and of {peer.vocabulary} tokens alone"
    return "takes bfloat16 alone" if peer.bf16 and dtype != torch.bfloat16 else ""
