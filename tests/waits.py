"""Counts where the host would wait for a GPU, on tensors that lie on the CPU."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
# How large their results are, the device alone knows.
SHAPES = ("nonzero", "masked_select", "unique_consecutive", "_unique2")


class Waits(TorchDispatchMode):
    """Context manager: ``lines`` counts reads of values, and shapes that depend on values, by real_fast's own lines.

    What others do on its behalf (an optimiser, the kernels' checks of values on the CPU) does not count, nor does what
    is known to lie on the host: the packing and the layout of packed rows.
    """

    def __init__(self):
        super().__init__()
        self.lines = Counter()

    def _see(self, depth):
        frame = sys._getframe(depth)
        path = Path(frame.f_code.co_filename)
        if "real_fast" in path.parts and path.parent.name != "batching" and path.name != "layout.py":
            self.lines[f"{path.name}: {frame.f_code.co_name}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or name in SHAPES:
            self._see(2)
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self._patches = [patch.object(torch.Tensor, name, self._counted(name)) for name in READS]
        for one in self._patches:
            one.start()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        for one in self._patches:
            one.stop()

    def _counted(self, name):
        read = getattr(torch.Tensor, name)

        def counted(tensor, *args, **kwargs):
            self._see(2)
            return read(tensor, *args, **kwargs)

        return counted
