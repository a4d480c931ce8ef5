"""The head's Triton kernels on pretended CUDA tensors: every launch's arguments are checked, then Triton's interpreter
computes it.

What a kernel takes for granted is written down here: on a GPU a wrong dtype or layout reads other numbers, and says
nothing. TRITON_INTERPRET=1 must be set before Triton is imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton.tools.tensor_descriptor import TensorDescriptor

from real_kernels import triton_head
from tests.gpu_lint.pretend import Pretended

_HALF = (torch.float16, torch.bfloat16)
_ANY = (*_HALF, torch.float32)
_FLOAT, _INDEX = (torch.float32,), (torch.int64,)


def _logits(a: dict[str, Any]) -> dict[str, Any]:
    """Of logits_kernel: for each tensor that it reads or writes with these options, its dtypes and elements."""
    n, m, columns, store = a["n"], a["m"], a["last"] - a["first"], a["STORE"]
    tiles = -(-columns // a["BN"])
    found = {"ids": (_INDEX, m if a["SHARED"] else n)}
    if a["BIAS"]:
        found["bias"] = (_ANY, a["last"])
    if store == 2:
        found |= {name: (_FLOAT, n) for name in ("row_max", "log_sum")}
        found |= {name: (_FLOAT, n * m) for name in ("dlogp", "logp")}
    else:
        found |= {name: (_FLOAT, tiles * n) for name in ("tile_max", "tile_sum", *["tile_ez"] * a["ENTROPY"])}
        found["selected"] = (_FLOAT, n * m)
    if a["BASE"]:
        found["row_base"] = (_FLOAT, n)
    return found


def _persistent(a: dict[str, Any]) -> dict[str, Any]:
    n, of_tiles = a["n"], -(-a["V"] // a["BN"]) * a["n"]
    return {
        "ids": (_INDEX, n),
        **{name: (_FLOAT, of_tiles) for name in ("tile_max", "tile_sum")},
        **{name: (_FLOAT, n) for name in ("selected", "row_base")},
    }


def _combine(a: dict[str, Any]) -> dict[str, Any]:
    n, m, of_tiles = a["n"], a["m"], a["tiles"] * a["n"]
    return {
        **{name: (_FLOAT, of_tiles) for name in ("tile_max", "tile_sum", *["tile_ez"] * a["ENTROPY"])},
        **{name: (_FLOAT, n * m) for name in ("selected", "logp")},
        **{name: (_FLOAT, n) for name in ("row_max", "log_sum", "entropy")},
    }


def _dlogits(a: dict[str, Any]) -> dict[str, Any]:
    n, m, tiles = a["n"], a["m"], -(-a["width"] // a["BN"])
    return {
        "ids": (_INDEX, m if a["SHARED"] else n),
        "tile_max": (_FLOAT, tiles * n),
        **{name: (_FLOAT, n) for name in ("row_max", "log_sum")},
        **{name: (_FLOAT, n * m) for name in ("dlogp", "logp")},
    }


def _base(a: dict[str, Any]) -> dict[str, Any]:
    found = {"ids": (_INDEX, a["n"]), "row_base": (_FLOAT, a["n"])}
    return found | ({"bias": (_ANY, a["V"])} if a["BIAS"] else {})


def _common_base(a: dict[str, Any]) -> dict[str, Any]:
    of_rows = ("row_base", "row_max", "log_sum", "dlogp", "logp", "factor")
    return {
        "ids": (_INDEX, a["n"]),
        "tile_max": (_FLOAT, a["tiles"] * a["n"]),
        **{name: (_FLOAT, a["n"]) for name in of_rows},
    }


def _reward(a: dict[str, Any]) -> dict[str, Any]:
    m, k = a["M"], a["K"]
    return {
        **{name: (_FLOAT, m * k) for name in ("logp", "engine_score_logprobs", "dlogp")},
        **{name: (_FLOAT, m) for name in ("labels", "y_hat", "reward", "advantages", "coefficient", "refinement")},
        "values": (_FLOAT, k),
        "group": (_INDEX, m),
        "rollout_valid": ((torch.uint8,), m),
        "counts": (_FLOAT, 2),
    }


def _scale(a: dict[str, Any]) -> dict[str, Any]:
    return {"source": (_ANY, a["n"]), "target": (_ANY, a["n"]), "factor": (_FLOAT, 1)}


READS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "logits_kernel": _logits,
    "persistent_kernel": _persistent,
    "base_kernel": _base,
    "combine_kernel": _combine,
    "common_base_kernel": _common_base,
    "dlogits_kernel": _dlogits,
    "reward_kernel": _reward,
    "scale_kernel": _scale,
}
# Tensors of rows with a stride: who holds how many rows and columns.
_ROWS: dict[str, dict[str, Callable[[dict[str, Any]], tuple[int, int, int]]]] = {
    "logits_kernel": {
        "h": lambda a: (a["n"], a["D"], a["stride_h"]),
        "w": lambda a: (a["last"], a["D"], a["stride_w"]),
        "out": lambda a: (a["n"], a["last"] - a["first"], a["stride_out"]) if a["STORE"] else (0, 0, 0),
    },
    # All three by descriptors, which know their strides.
    "persistent_kernel": {
        "h": lambda a: (a["n"], a["D"], a["h"].strides[0]),
        "w": lambda a: (a["V"], a["D"], a["w"].strides[0]),
        "out": lambda a: (a["n"], a["V"], a["out"].strides[0]),
    },
    "base_kernel": {
        "h": lambda a: (a["n"], a["D"], a["stride_h"]),
        "w": lambda a: (a["V"], a["D"], a["stride_w"]),
    },
    "common_base_kernel": {"saved": lambda a: (a["n"], a["width"], a["stride"])},
    "dlogits_kernel": {"saved": lambda a: (a["n"], a["width"], a["stride"])},
}


class LaunchError(AssertionError):
    """An argument that the kernel would read wrongly."""


class Checked:
    """Stands in for a kernel: ``kernel[grid](...)`` checks, notes and interprets."""

    def __init__(self, name: str, kernel: Any, launched: Counter[str]) -> None:
        self.name, self.kernel, self.launched = name, kernel, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | options
            self.launched[self.name] += 1
            if not all(isinstance(size, int) and size > 0 for size in grid):
                raise LaunchError(f"{self.name}: a grid of {grid}")
            self.check(arguments)
            if "WIDEN" in options:
                if options["WIDEN"]:
                    raise LaunchError(f"{self.name}: WIDEN is for the interpreter alone")
                options["WIDEN"] = True  # the interpreter's dot knows no bfloat16
            with _disable_current_modes():
                self.kernel[grid](*map(_on_host, args), **options)

        return launch

    def check(self, a: dict[str, Any]) -> None:
        """Raise :class:`LaunchError` for a tensor on the host, of another dtype, with gaps, or too small."""
        for name, x in a.items():
            base = x.base if isinstance(x, TensorDescriptor) else x
            if isinstance(base, torch.Tensor) and not isinstance(base, Pretended):
                raise LaunchError(f"{self.name}: {name} is on {base.device}")
        for name, (dtypes, numbers) in READS[self.name](a).items():
            x = a[name]
            what = f"{self.name}: {name} is {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()}"
            if x.dtype not in dtypes:
                raise LaunchError(f"{what}; it must be {' or '.join(map(str, dtypes))}")
            if not x.is_contiguous():
                raise LaunchError(f"{what}; it must be contiguous")
            if x.numel() < numbers:
                raise LaunchError(f"{what}; {numbers} numbers of it are used")
        for name, rows_of in _ROWS.get(self.name, {}).items():
            rows, columns, stride = rows_of(a)
            self.check_rows(name, a[name], rows, columns, stride)

    def check_rows(self, name: str, x: Any, rows: int, columns: int, stride: int) -> None:
        """A matrix whose rows are `stride` apart, or the descriptor of one."""
        if not rows:
            return
        base = x.base if isinstance(x, TensorDescriptor) else x
        what = f"{self.name}: {name} is {base.dtype} of shape {tuple(base.shape)} and strides {base.stride()}"
        if base.dtype not in _ANY or base.dim() != 2 or base.stride(1) != 1 or base.stride(0) != stride:
            raise LaunchError(f"{what}; it must have rows that are {stride} apart, without gaps in them")
        room = base.untyped_storage().nbytes() // base.element_size() - base.storage_offset()
        if room < (rows - 1) * stride + columns:
            raise LaunchError(f"{what}; {rows} rows of {columns} are used")
        if isinstance(x, TensorDescriptor) and (base.data_ptr() % 16 or stride * base.element_size() % 16):
            raise LaunchError(f"{what}; a descriptor's rows start on 16 bytes")


def _on_host(x: Any) -> Any:
    if isinstance(x, Pretended):
        return x.elem
    if isinstance(x, TensorDescriptor):
        return TensorDescriptor.from_tensor(x.base.elem, x.block_shape)
    return x


@contextmanager
def checked_launches() -> Iterator[Counter[str]]:
    """The Triton head as on a GPU, but for the kernels themselves. Yields the number of launches by kernel."""
    launched: Counter[str] = Counter()
    kernels = {name: Checked(name, getattr(triton_head, name), launched) for name in READS}
    with patch.multiple(triton_head, interpreted=lambda: False, BASE_ROWS=1, **kernels):
        yield launched
