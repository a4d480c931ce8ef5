"""real-fast: a trainer that turns a language model into a better judge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from real_fast.utils.version import __version__

if TYPE_CHECKING:
    from real_fast.errors import GradeError
    from real_fast.judging.grade import Grade
    from real_fast.judging.judge import Judge

__all__ = ["Grade", "GradeError", "Judge", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the judge when it is first asked for: it brings PyTorch and Transformers along, which take seconds."""
    if name == "GradeError":
        from real_fast.errors import GradeError

        return GradeError
    if name in __all__:
        from real_fast.judging import grade, judge

        return judge.Judge if name == "Judge" else grade.Grade
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
