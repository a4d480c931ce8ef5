"""Many short Python lists as one tensor."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import numpy as np
import torch


def flat(lists: Iterable[Iterable[float]], dtype: type[np.int64] | type[np.float64] = np.int64) -> torch.Tensor:
    """[sum of lengths] int64 or float64: the lists' numbers, one list behind the other.

    A third of the time of ``torch.tensor(list(...))``, which looks at every number's type.
    """
    return torch.from_numpy(np.fromiter(chain.from_iterable(lists), dtype))
