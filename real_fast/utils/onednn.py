"""oneDNN, which computes 16-bit matrix products on a CPU: how many of them it keeps compiled."""

from __future__ import annotations

import os

_NAME = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def keep_few_products() -> None:
    """Let oneDNN keep 64 compiled products instead of 1,024, unless the environment says otherwise.

    Each number of rows is compiled, and packed batches hardly ever repeat theirs; within a pass, all layers share a few
    products. Where oneDNN has computed something in this process before, nothing changes any more.
    """
    os.environ.setdefault(_NAME, "64")
