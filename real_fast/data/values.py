"""Values as people's records hold them (JSON, Parquet, a data frame's row), as plain Python ones."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np

from real_fast.errors import RowError

MAX_DEPTH = 64  # levels of nesting; deeper than any record that means something, and far from Python's own limit

_JSON_TEXT = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', flags=re.DOTALL)


def plain(value: Any, depth: int = MAX_DEPTH) -> Any:
    """A value without what only NumPy and pandas know: arrays become lists, and what stands for "missing" None.

    None, NaN, ``pandas.NA`` and ``pandas.NaT`` are all that: one of them fills an empty cell, as the column's type has
    it. Dates and anything else are left as they are.

    Raises:
        RowError: The value is nested deeper than `depth`.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float | Decimal):
        return None if math.isnan(value) else value
    if isinstance(value, np.generic | np.ndarray):
        found = value.tolist()
        return value if isinstance(found, np.generic) else plain(found, depth)  # Python has no long double
    if isinstance(value, Mapping | list | tuple):
        if depth == 0:
            raise RowError(f"nested too deep: more than {MAX_DEPTH} levels")
        if isinstance(value, Mapping):
            return {key: plain(item, depth - 1) for key, item in value.items()}
        return [plain(item, depth - 1) for item in value]
    return None if type(value).__name__ in ("NAType", "NaTType") else value


def is_missing(value: Any) -> bool:
    """Whether a :func:`plain` value says nothing: None or empty text."""
    return value is None or (isinstance(value, str) and not value)


def as_mapping(record: Any) -> Mapping[Any, Any]:
    """A record as a mapping: also a data frame's row, as ``iterrows`` and ``itertuples`` give it.

    Raises:
        RowError: It is none.
    """
    if isinstance(record, Mapping):
        return record
    for name in ("to_dict", "_asdict"):
        if callable(convert := getattr(record, name, None)) and isinstance(found := convert(), Mapping):
            return found
    raise RowError(f"not an object: {type(record).__name__}")


def for_json(value: Any, depth: int = MAX_DEPTH) -> Any:
    """A copy that JSON has a form for: NaN, dates and their like become text, and what is nested too deep a note."""
    if depth == 0 and isinstance(value, Mapping | list | tuple | np.ndarray):
        return f"(nested deeper than {MAX_DEPTH} levels)"
    if isinstance(value, Mapping):
        return {str(key): for_json(item, depth - 1) for key, item in value.items()}
    if isinstance(value, np.generic | np.ndarray) and not isinstance(found := value.tolist(), np.generic):
        return for_json(found, depth)
    if isinstance(value, list | tuple):
        return [for_json(item, depth - 1) for item in value]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def number(value: Any) -> float | None:
    """A finite number, given as such or as text; None for anything else, booleans included."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, (Real, Decimal, str)):
        return None
    if isinstance(value, str) and "_" in value:
        return None
    try:
        result = float(value)
    except (ValueError, OverflowError):
        return None
    return result if math.isfinite(result) else None


def too_deep(text: str) -> bool:
    """Whether JSON text is nested deeper than :data:`MAX_DEPTH`, found without recursion and in linear time."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", _JSON_TEXT.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            return True
    return False
