"""What a micro-batch's gradient of the lm_head costs in memory and in bytes moved, summed by autograd or in place.

``python -m benchmarks.head_gradient`` writes results/head_gradient.json, which docs/less-memory.md has its table from.
Bytes are counted, not timed: every PyTorch operator's inputs and outputs of the weight's width and 1024 rows or more.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.machine import ROOT, PeakMemory, machine
from real_kernels import HeadOptions, ops, weighted_logprob

RESULTS = ROOT / "benchmarks" / "results" / "head_gradient.json"
HEADS = {"SmolLM2-135M": (49152, 576), "Qwen2.5-0.5B": (151936, 896)}
ROWS, MICRO_BATCHES = 64, 4
# Operators that only write what they are given to write into.
_WRITES = ("zero_", "fill_", "copy_", "mm", "zeros_like")
_INSIDE = {"real_kernels::weighted_logprob": ops._weighted_logprob}


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write of tensors [1024 or more, D], the weight as a product's operand left out."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.width, self.weights, self.bytes = weight.shape[1], {_storage(weight)}, Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "real_kernels":
            with self:  # what it is made of is looked into
                return _INSIDE[function._schema.name](*args, **kwargs)
        out = function(*args, **kwargs)
        name = function._schema.name.removeprefix("aten::")
        if "empty" in name:
            return out
        product = name in ("mm", "addmm", "addmm_")
        if any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns):
            return out  # a view
        inputs = [a for a in (*args, *kwargs.values()) if self._large(a)]
        if self._large(out):
            if name in _WRITES:
                inputs = [i for i in inputs if name != "zeros_like" and _storage(i) != _storage(out)]
            self.bytes[name] += _bytes(out)
        self.bytes[name] += sum(_bytes(i) for i in inputs if not (product and _storage(i) in self.weights))
        if name == "_to_copy" and self._large(out) and out.dtype == torch.bfloat16:
            self.weights.add(_storage(out))  # the weight's 16-bit copy
        return out

    def _large(self, x: Any) -> bool:
        return isinstance(x, torch.Tensor) and x.dim() == 2 and self.width in x.shape and x.numel() >= 1024 * self.width


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def update(master: torch.Tensor, copies: bool, fused: bool) -> None:
    """The gradients of an update's micro-batches, added up in ``master.grad``."""
    d = master.shape[1]
    options, copy = HeadOptions(impl="torch", validate=False), None
    g = torch.Generator().manual_seed(0)
    for _ in range(MICRO_BATCHES):
        hidden = torch.randn(ROWS, d, generator=g)
        targets, coefficients = torch.arange(ROWS), torch.full((ROWS,), -1 / ROWS)
        weight = master
        if copies and not fused:
            weight = master.to(torch.bfloat16)  # as autocast would, once a micro-batch
        elif copies:
            copy = master.detach().to(torch.bfloat16).requires_grad_() if copy is None else copy
            weight = copy
        if fused:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            weight.main_grad = master.grad  # type: ignore[attr-defined]
        hidden = hidden.to(weight.dtype).requires_grad_()
        weighted_logprob(hidden, weight, targets, coefficients, head=options)[0].backward()
    if hasattr(master, "main_grad"):
        del master.main_grad


def measure(v: int, d: int, copies: bool, fused: bool) -> dict[str, Any]:
    """Bytes a parameter and micro-batch, and the peak above weight and gradient."""
    master = (torch.randn(v, d, generator=torch.Generator().manual_seed(1)) / d**0.5).requires_grad_()
    with Traffic(master) as traffic:
        update(master, copies, fused)
    master.grad = None
    with PeakMemory() as peak:
        update(master, copies, fused)
    held = master.numel() * 4  # the gradient, which every way needs
    each = {name: n / master.numel() / MICRO_BATCHES for name, n in traffic.bytes.items() if n}
    above = None if peak.bytes is None else peak.bytes - held
    return {"bytes": sum(each.values()), "by_operator": each, "peak_above": above}


def main() -> None:
    """Measure every head and write what came out."""
    lines = []
    for model, (v, d) in HEADS.items():
        for copies in (False, True):
            for fused in (False, True):
                found = measure(v, d, copies, fused)
                lines.append({"model": model, "V": v, "D": d, "bf16": copies, "fused": fused, **found})
                print(json.dumps(lines[-1]), flush=True)
    report = {**machine(), "rows": ROWS, "micro_batches": MICRO_BATCHES, "cases": lines}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
