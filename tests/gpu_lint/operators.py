"""The head's functions on a pretended CUDA device, forward and backward, in every mode that its launches differ in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch

from real_kernels import (
    HeadOptions,
    RealObjective,
    linear_logprob,
    logprob_and_entropy,
    real_loss,
    score_logprobs,
    tiles,
    weighted_logprob,
)
from tests.gpu_lint.launches import checked_launches
from tests.gpu_lint.pretend import CUDA, cuda_device

N, M, K = 40, 8, 5
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """A call: D and V, the dtype, and the options."""

    function: str = "real"
    d: int = 64
    v: int = 512
    dtype: torch.dtype = BF16
    head: HeadOptions = field(default_factory=lambda: HeadOptions(impl="triton", validate=False))
    objective: RealObjective = field(default_factory=RealObjective)
    bias: bool = False
    valid: bool = False  # a rollout without a score
    every_row: bool = False
    from_engine: bool = False
    frozen: bool = False
    main_grad: bool = False
    persistent: bool = False
    gapped: bool = False  # hidden states that are columns of a wider tensor


def _head(**options: Any) -> HeadOptions:
    return HeadOptions(**{"impl": "triton", "validate": False} | options)


SMALL = 8 * 512 * 2  # bytes of eight rows
CASES: dict[str, Case] = {
    "real": Case(),
    "real, recomputed": Case(head=_head(mode="recompute")),
    "real, every row": Case(every_row=True),
    "real, a rollout without score": Case(valid=True),
    "real, a rollout without score, recomputed": Case(valid=True, every_row=True, head=_head(mode="recompute")),
    "real, in chunks": Case(head=_head(mode="forward", chunk_bytes=SMALL)),
    "real, recomputed in chunks": Case(head=_head(mode="recompute", chunk_bytes=SMALL)),
    "real, gradient of 1": Case(head=_head(unit_gradient=True)),
    "real, values checked": Case(head=_head(validate=True)),
    "real, soft-cap, temperature, bias": Case(head=_head(softcap=5.0, temperature=0.7), bias=True),
    "real, odd D and V": Case(d=50, v=389),
    "real, odd D and V, recomputed": Case(d=50, v=389, head=_head(mode="recompute")),
    "real, rows with gaps": Case(gapped=True),
    "real, fp16": Case(dtype=FP16),
    "real, fp32": Case(dtype=FP32),
    "real, fp32, by PyTorch": Case(dtype=FP32, head=_head(impl="torch", mode="recompute")),
    "real, by PyTorch": Case(head=_head(impl="torch")),
    "real, authors' reward of the engine's scores": Case(
        objective=RealObjective(reward="authors", loss_norm="token_mean", renormalize=True), from_engine=True
    ),
    "real, frozen head": Case(frozen=True),
    "real, main_grad": Case(main_grad=True),
    "real, main_grad, recomputed in chunks": Case(main_grad=True, head=_head(mode="recompute", chunk_bytes=SMALL)),
    "weighted": Case("weighted"),
    "weighted, gradient of 1": Case("weighted", head=_head(unit_gradient=True)),
    "weighted, in chunks, bias": Case("weighted", bias=True, head=_head(mode="forward", chunk_bytes=SMALL)),
    "weighted, main_grad in chunks": Case("weighted", main_grad=True, head=_head(mode="forward", chunk_bytes=SMALL)),
    "weighted, persistent": Case("weighted", v=1100, persistent=True),
    "weighted, persistent, odd V, in chunks": Case(
        "weighted", v=389, persistent=True, head=_head(mode="forward", chunk_bytes=SMALL)
    ),
    "real, persistent": Case(persistent=True),
    "linear": Case("linear"),
    "linear, fp32, by PyTorch": Case("linear", dtype=FP32, head=_head(impl="torch")),
    "entropy": Case("entropy", bias=True),
    "scores": Case("scores"),
}
# The only places of the head where the host waits.
MAY_WAIT = {
    ("size", "real_kernels/head.py:real_forward"),
    ("size", "real_kernels/real_op.py:_again"),
    ("copy to the host", "real_kernels/checks.py:ValueChecks.run"),
}


def tensors(case: Case) -> dict[str, torch.Tensor]:
    """What the functions take, on the CPU."""
    g = torch.Generator().manual_seed(0)

    def states(n: int, scale: float) -> torch.Tensor:
        x = torch.randn(n, case.d + 16 * case.gapped, generator=g) * scale
        return x.to(case.dtype)[:, : case.d]

    def ids(limit: int, n: int) -> torch.Tensor:
        return torch.randint(limit, (n,), generator=g)

    found = {"hidden": states(N, 1.0), "score_hidden": states(M, 1.0), "weight": states(case.v, 0.3)}
    found |= {"targets": ids(case.v, N), "rollout": ids(M, N), "coefficients": torch.randn(N, generator=g)}
    found |= {"score_ids": torch.randperm(case.v, generator=g)[:K], "score_values": torch.arange(1.0, K + 1)}
    found |= {"labels": 1 + 4 * torch.rand(M, generator=g), "group": torch.arange(M) // 4}
    if case.bias:
        found["bias"] = torch.randn(case.v, generator=g).to(case.dtype)
    if case.valid:
        found["rollout_valid"] = torch.arange(M) != 3
    if case.from_engine:
        found["engine_score_logprobs"] = torch.randn(M, K, generator=g).log_softmax(1)
    return found


def call(case: Case, t: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a case, and the gradients by name."""
    if case.main_grad:
        t["weight"].main_grad = torch.zeros_like(t["weight"], dtype=torch.float32)  # type: ignore[attr-defined]
    for name in ("hidden", "score_hidden", *["weight"] * (not case.frozen), *["bias"] * case.bias):
        t[name].requires_grad_()
    h, w, options = t["hidden"], t["weight"], {"bias": t.get("bias"), "head": case.head}
    if case.function == "real":
        names = ("targets", "rollout", "score_hidden", "score_ids", "score_values", "labels", "group")
        more = {name: t.get(name) for name in ("rollout_valid", "engine_score_logprobs")}
        more |= {"objective": case.objective, "skip_zero_rows": not case.every_row}
        loss = real_loss(h, w, *(t[name] for name in names), **more, **options).loss  # type: ignore[arg-type]
    elif case.function == "weighted":
        loss = weighted_logprob(h, w, t["targets"], t["coefficients"], **options)[0]  # type: ignore[arg-type]
    elif case.function == "scores":
        loss = score_logprobs(h, w, t["score_ids"], **options).exp().sum()  # type: ignore[arg-type]
    elif case.function == "entropy":
        loss = logprob_and_entropy(h, w, t["targets"], **options)[0].sum()  # type: ignore[arg-type]
    else:
        loss = (linear_logprob(h, w, t["targets"], **options) * t["coefficients"]).sum()  # type: ignore[arg-type]
    loss.backward()
    found = {name: x.grad for name, x in t.items() if x.grad is not None}
    if case.main_grad:
        found["weight"] = t["weight"].main_grad  # type: ignore[attr-defined]
    return loss.detach(), found


@dataclass
class Outcome:
    """Loss and gradients, taken back to the CPU, where the host waited, and the launches."""

    loss: float
    gradients: dict[str, torch.Tensor]
    waits: Counter[tuple[str, str]]
    launches: Counter[str]


def run(case: Case) -> Outcome:
    """On the pretended device."""
    shipped = tiles.TILES["sm_90"]
    only = {"sm_90": tuple(t for t in shipped if t.persistent) if case.persistent else shipped}
    with mock.patch.dict(tiles.TILES, only), cuda_device() as mode, checked_launches() as launched:
        here = {name: _to_device(x) for name, x in tensors(case).items()}
        mode.waits.clear()
        loss, gradients = call(case, here)
        waits = mode.waits.copy()
        for name, x in gradients.items():
            expected = FP32 if case.main_grad and name == "weight" else case.dtype
            if x.device != CUDA or x.dtype != expected:
                raise AssertionError(f"the gradient of {name} is {x.dtype} on {x.device}")
        return Outcome(float(loss), {name: x.cpu() for name, x in gradients.items()}, waits, launched)


def on_the_cpu(case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    """The same by PyTorch on the CPU, from the same numbers in float32."""
    plain = {name: x.float() if x.is_floating_point() else x for name, x in tensors(case).items()}
    head = replace(case.head, impl="torch", mode="recompute", chunk_bytes=None)
    loss, gradients = call(replace(case, head=head, main_grad=False), plain)
    return float(loss), gradients


def _to_device(x: torch.Tensor) -> torch.Tensor:
    """With its strides, which ``to`` would make contiguous."""
    there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)
    return there.copy_(x)
