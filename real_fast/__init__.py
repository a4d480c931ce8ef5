"""real-fast: a trainer that turns a language model into a better judge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from real_fast.grade import Grade, GradeError
    from real_fast.grading import Judge

__all__ = ["Grade", "GradeError", "Judge"]


def __getattr__(name: str) -> Any:
    """Import the judge when it is first asked for: it brings PyTorch and Transformers along, which take seconds."""
    if name in __all__:
        from real_fast import grade, grading

        return grading.Judge if name == "Judge" else getattr(grade, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
