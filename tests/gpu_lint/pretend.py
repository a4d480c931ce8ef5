"""Tensors that say they are on a CUDA device, and are computed on the CPU.

Every operation on them comes here. It is refused where a GPU would refuse it (tensors of the host and of the device
mixed, dtypes that a CUDA kernel does not take), noted where the host would wait for the device, and then computed for
real, so that whatever looks at a value finds the right one.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.gpu_lint.cuda_only import CUDA_ONLY

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
_ROOT = Path(__file__).resolve().parents[2]
OURS = {str(_ROOT / folder) + "/": folder.split("/")[-1] for folder in ("real_fast", "kernels/real_kernels")}

_COMPREHENSION = re.compile(r"(\.<locals>\.<(listcomp|setcomp|dictcomp|genexpr)>)+$")

# How many numbers come out depends on values, so the host asks the device before it can go on.
_SIZES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
}
# A CUDA kernel of these takes no whole numbers; the CPU's do.
_FLOATS_ONLY = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
_TAKES_HOST_SCALARS = {aten.fill.Tensor, aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}
_LIKE = {op.default for op in (aten.empty_like, aten.zeros_like, aten.ones_like, aten.rand_like, aten.full_like)}
_LIKE |= {op.default for op in (aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full)}
_INDEXES = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
_COPIES = {aten._to_copy.default, aten.copy_.default}


class Pretended(torch.Tensor):
    """A CUDA tensor by what it says; `elem` has its numbers, on the CPU, with the same strides."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> Pretended:
        made: Pretended = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device=CUDA,
        )
        made.elem = elem
        return made

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Pretended:
        made = Pretended(self.elem.clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Pretended({self.elem})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a pretended CUDA tensor outside of Pretending")


class Pretending(TorchDispatchMode):
    """In here ``torch.device("cuda")`` works. `waits` counts by kind and by the place in our code that asked."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()

    def wait(self, kind: str) -> None:
        """Note that the host waits."""
        self.waits[kind, place()] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        device = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        if not any(isinstance(x, Pretended) for x in tensors) and device != "cuda":
            return func(*args, **{name: value for name, value in kwargs.items() if name != "pin_memory"})
        if func.namespace != "aten":
            return self._custom(func, tensors, args, kwargs)
        if func in _COPIES:
            return self._copy(func, device, args, kwargs)
        self._check(func, tensors, args)
        self._note_waits(func, args, kwargs)
        out = CUDA_ONLY.get(func, func)(*_on_host(args), **_on_host(_without_device(kwargs)))
        if device == "cpu":
            return out
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(torch.Tensor, _pretended, out))

    def _custom(self, func: Any, tensors: Sequence[torch.Tensor], args: Any, kwargs: Any) -> Any:
        """An operator of torch.library: its own code, with the mode on. It gets all its tensors on one device."""
        where = sorted({x.device.type for x in tensors})
        if len(where) > 1:
            raise RuntimeError(f"{func} gets tensors on {' and '.join(where)}")
        with self:
            return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)

    def _copy(self, func: Any, device: str | None, args: Any, kwargs: Any) -> Any:
        """Between host and device. One that is not to block is taken to be between the device and pinned memory."""
        source, target = args[0], args[0]
        blocks = not kwargs.get("non_blocking", False)
        if func is aten.copy_.default:
            target, source = args[0], args[1]
            blocks = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            to_device = isinstance(target, Pretended)
        else:
            to_device = isinstance(source, Pretended) if device is None else device == "cuda"
        from_device = isinstance(source, Pretended)
        if from_device != to_device and blocks:
            self.wait("copy to the host" if from_device else "copy to the device")
        out = func(*_on_host(args), **_on_host(_without_device(kwargs)))
        if func is aten.copy_.default:
            return target
        return _pretended(out) if to_device else out

    def _check(self, func: Any, tensors: Sequence[torch.Tensor], args: Any) -> None:
        host = [x for x in tensors if not isinstance(x, Pretended)]
        # Indices on the host are copied to the device, and noted below; what is indexed and written must be there.
        indexes = func.overloadpacket in _INDEXES and isinstance(args[0], Pretended)
        copied = {id(x) for x in args[1]} if indexes else set()
        # A single number of the host goes along with a launch, where the operation takes one at all.
        numbers = torch.Tag.pointwise in func.tags or func in _TAKES_HOST_SCALARS or indexes
        # Of something that is like another, the device alone counts that is asked for.
        for x in () if func in _LIKE else host:
            if id(x) not in copied and (x.dim() or not numbers):
                raise RuntimeError(
                    f"{func} gets tensors on the CPU and on cuda:0: {[(x.device.type, list(x.shape)) for x in tensors]}"
                )
        if func in _FLOATS_ONLY and not tensors[-1].is_floating_point():
            raise RuntimeError(f"{func} has no CUDA kernel for {tensors[-1].dtype}")

    def _note_waits(self, func: Any, args: Any, kwargs: Any) -> None:
        if func is aten._local_scalar_dense.default:
            self.wait("number")
        elif func in _SIZES:
            self.wait("size")
        elif func is aten.equal.default:
            self.wait("number")
        elif func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self.wait("size")
        elif func.overloadpacket in _INDEXES:
            indices = [x for x in args[1] if x is not None]
            if any(not isinstance(x, Pretended) for x in indices):
                self.wait("copy to the device")
            # A single number written through one mask is filled in; everything else lists the mask's places first.
            fills = func.overloadpacket is not aten.index and args[2].numel() == 1 and len(indices) == 1
            if any(x.dtype == torch.bool for x in indices) and not fills:
                self.wait("size")


def _on_host(tree: Any) -> Any:
    return tree_map_only(Pretended, lambda x: x.elem, tree)


def _pretended(x: torch.Tensor) -> torch.Tensor:
    return x if isinstance(x, Pretended) else Pretended(x)


def _without_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a CPU computes with in place of the device, and without memory that is pinned for one."""
    return {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items() if k != "pin_memory"}


def place() -> str:
    """``file:function`` of the innermost frame that is ours; "autograd" where none is.

    Lines would change with every edit.
    """
    frame = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        for folder, name in OURS.items():
            if file.startswith(folder):
                # Python 3.12 and newer run comprehensions as a part of the function around them.
                function = _COMPREHENSION.sub("", frame.f_code.co_qualname)
                return f"{name}/{file.removeprefix(folder)}:{function}"
        frame = frame.f_back
    return "autograd"


@contextmanager
def cuda_device() -> Iterator[Pretending]:
    """One pretended H100 to this process; guard.cpp must be loaded. Yields the mode, which is on."""
    mode = Pretending()
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda **_: True,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "pretended",
        "get_device_properties": lambda *_: SimpleNamespace(multi_processor_count=2),
        "device": lambda *_: nullcontext(),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "max_memory_allocated": lambda *_: 0,
        "mem_get_info": lambda *_: (80 * 2**30, 80 * 2**30),
        "synchronize": lambda *_: mode.wait("synchronize"),
        "_lazy_init": lambda: None,
    }
    patches = [patch.object(torch.cuda, name, answer) for name, answer in answers.items()]
    patches.append(patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
    lifted: Callable[[bool], None] = torch._C._set_only_lift_cpu_tensors
    for one in patches:
        one.start()
    lifted(True)  # torch.tensor(..., device="cuda") is then made on the CPU, and copied
    # A module that moves gets new parameters: the old ones' `data` cannot become a tensor of another class.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with mode:
            yield mode
    finally:
        lifted(False)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        for one in patches:
            one.stop()
