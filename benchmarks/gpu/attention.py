"""Shared-prompt attention by one backend beside SDPA's, forward and backward, both against float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.stages import Check, attempt
from real_fast.attention.flash import HAS_FLASH_ATTN
from real_fast.attention.interface import Backend, prepare
from real_fast.attention.layout import Layout

# A prompt's length and those of its responses, and the window of layers that have one.
Groups = tuple[tuple[int, tuple[int, ...]], ...]
LARGE: Groups = ((300, (64, 64, 250, 1)), (129, (7, 33, 1)), (1200, (250, 249, 130)))
SMALL: Groups = ((17, (6, 4, 1)), (9, (3, 1)))
WINDOWS = (None, 100)
# Of SDPA's error: where own keys and the prompt's are merged, a result is rounded once more, in any order of sums.
SLACK = 2.0
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
NAMES = ("out", "dQ", "dK", "dV")


def compare(check: Check, backend: Backend) -> int:
    """Say how far either is off. Returns how many results of the backend are further off than they may be."""
    wrong, heads, size = 0, (4, 2) if check.small else (16, 8), 16 if check.small else 128
    layout = Layout.of_groups(SMALL if check.small else LARGE)
    dtype = torch.bfloat16 if check.device.type == "cuda" else torch.float32
    kernel = "flash-attn's" if backend == "varlen" and HAS_FLASH_ATTN else "PyTorch's"
    for window in WINDOWS:
        inputs = _inputs(layout, heads, size, dtype, check.device)
        want = _with_gradients(_dense(layout, window, size), [x.double() for x in inputs])
        sdpa, mine = (_errors(check, layout, name, inputs, window, want) for name in ("sdpa", backend))
        for name, (beside, _), (error, whole) in zip(NAMES, sdpa, mine, strict=True):
            # Of float32 no error is worth comparing with another.
            bound = max(SLACK * beside, 1e-5)
            fine = whole and error <= bound
            wrong += not fine
            ending = "" if fine else "; WRONG"
            off = f"{name} off by {error:.1e}, sdpa's by {beside:.1e}{ending}"
            print(f"attention: {backend} ({kernel}), window {window}: {off}")
    return wrong


def flex(check: Check, _: float) -> int:
    """The last stage: FlexAttention is compiled, which takes long."""
    return compare(check, _here(check, "flex"))


def varlen(check: Check, _: float) -> int:
    """What training in bf16 on a card takes."""
    return compare(check, _here(check, "varlen"))


def _here(check: Check, backend: Backend) -> Backend:
    """The backend, or SDPA alone where it does not run."""
    if check.device.type == "cuda":
        return backend
    print(f"attention: {backend} left out: it needs a CUDA device")
    return "sdpa"


def _errors(
    check: Check,
    layout: Layout,
    backend: Backend,
    inputs: list[torch.Tensor],
    window: int | None,
    want: list[torch.Tensor],
) -> list[tuple[float, bool]]:
    """Of each result, and whether there was one: relative, by Euclidean norm."""

    def results() -> list[torch.Tensor]:
        attention = prepare(layout, backend, check.device)
        scale = inputs[0].shape[-1] ** -0.5
        return _with_gradients(lambda q, k, v: attention(q, k, v, scale, window), inputs)

    got, whole = attempt(check, f"attention: {backend}, window {window}", results)
    if not whole:
        return [(float("nan"), False)] * len(want)
    return [(float((g.double() - w).norm() / w.norm()), True) for g, w in zip(got, want, strict=True)]


def _inputs(
    layout: Layout, heads: tuple[int, int], size: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """Queries, keys and values as a model makes them: [1, T, H, Dh] transposed."""
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(1, layout.tokens, h, size, generator=g) for h in (heads[0], heads[1], heads[1])]
    return [x.to(device, dtype).transpose(1, 2) for x in made]


def _dense(layout: Layout, window: int | None, size: int) -> Attend:
    """The definition: all keys, and a mask."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = layout.mask(window).to(q.device)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=size**-0.5, enable_gqa=True)

    return attend


def _with_gradients(attend: Attend, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output and the gradients of queries, keys and values, under one upstream gradient."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
