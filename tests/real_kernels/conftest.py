"""Makes Triton's interpreter round as the hardware does."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def hardware_rounding():
    """The interpreter cuts float32 off to bfloat16 where GPUs round to nearest even: twice the error, and a bias."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton import language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).to(torch.bfloat16)
            return rounded.view(torch.uint16).numpy()
        return original(data, source, target, rounding)

    interpreter._convert_float = convert
    yield
    interpreter._convert_float = original
