"""The user's message: a template file, and a row's fields put into it."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from real_fast.errors import PromptError
from real_fast.score.ending import TEMPLATE_ERRORS

TEMPLATES = Path(__file__).parent / "templates"

# What a template can use; the first four are texts of the row, "extra" its further fields, the rest the score scale's.
ROW_FIELDS = ("instruction", "response", "rubric", "reference_answer")
VARIABLES = (*ROW_FIELDS, "extra", "phrase", "scores", "min_score", "max_score")


class PromptRow(Protocol):
    """The fields of a row that a prompt is made of: see :class:`real_fast.types.JudgeRow`."""

    instruction: str
    response: str
    rubric: str
    reference_answer: str
    messages: list[dict[str, str]]
    extra: dict[str, Any]


def template_path(name: str) -> Path:
    """The file of a template: one of the package by its bare name ("judge"), anything with a suffix as a path.

    Raises:
        PromptError: There is no such template; the message lists the package's own.
    """
    path = Path(name).expanduser()
    if not path.suffix:
        path = TEMPLATES / f"{name}.jinja"
    if not path.is_file():
        names = sorted(p.stem for p in TEMPLATES.glob("*.jinja"))
        known, close = ", ".join(names), get_close_matches(path.stem.lower(), names, n=1)
        raise PromptError(
            f"prompt.template {name!r}: there is no file {path.absolute()}"
            f"{f'; did you mean {close[0]}?' if close else '.'} "
            f"Give a .jinja or .txt file, or one of the package's: {known}"
        )
    if path.suffix not in (".jinja", ".j2", ".txt"):
        raise PromptError(f"prompt.template {name!r}: a template is a .jinja, .j2 or .txt file, not {path.suffix}")
    return path


class Template:
    """A template, read once.

    Lines that hold only a Jinja statement leave no trace, as in chat templates; in a .txt template ``{scores}`` is a
    comma-separated list, ``{extra.NAME}`` a further field, and nothing else stands between braces.

    Args:
        name: As in ``prompt.template``.
        fixed: The score scale's variables, which are trusted.
        data: Called with every other text that is put in.

    Attributes:
        file: The file's name.
        source: Its text.
        used: The variables that it uses.

    Raises:
        PromptError: Missing or broken template, a variable that does not exist.
    """

    def __init__(self, name: str, fixed: Mapping[str, Any], data: Callable[[str], str]) -> None:
        path = template_path(name)
        self.name = name
        self.file = path.name
        self._fixed = {key: _Trusted(value) if isinstance(value, str) else value for key, value in fixed.items()}
        self._data = data
        try:
            self.source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(f"prompt.template {name!r}: cannot read {path}: {error}") from error
        self._render, self.used = self._format() if path.suffix == ".txt" else self._jinja()
        if unknown := sorted(self.used - set(VARIABLES)):
            raise PromptError(
                f"prompt.template {name!r} uses {', '.join(map(repr, unknown))}, which does not exist: "
                f"the variables are {', '.join(VARIABLES)}; a further field of the rows is extra.{unknown[0]}"
            )
        if "response" not in self.used:
            raise PromptError(f"prompt.template {name!r} never uses 'response', which is what there is to grade")

    def render(self, row: PromptRow) -> str:
        """The user's message for a row.

        Raises:
            PromptError: The template fails on this row.
        """
        # TRACT's own rows keep the further fields of the rows that they were made of in one named extra.
        kept = row.extra.get("extra")
        extra = {**row.extra, **kept} if isinstance(kept, Mapping) else row.extra
        fields = {name: getattr(row, name) for name in ROW_FIELDS} | {"extra": _Extra(extra)}
        try:
            return self._render(fields | self._fixed)
        except TEMPLATE_ERRORS as error:
            missing = "extra" in self.used and isinstance(error, jinja2.UndefinedError | KeyError)
            known = f"; the row's further fields are {', '.join(extra) or '(none)'}" if missing else ""
            raise PromptError(f"prompt.template {self.name!r} fails: {type(error).__name__}: {error}{known}") from error

    def _put_in(self, value: Any) -> str:
        return value if isinstance(value, _Trusted) else self._data(str(value))

    def _jinja(self) -> tuple[Callable[[Mapping[str, Any]], str], frozenset[str]]:
        env = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=self._put_in
        )
        try:
            used = jinja2.meta.find_undeclared_variables(env.parse(self.source)) - set(env.globals)
            return env.from_string(self.source).render, frozenset(used)
        except jinja2.TemplateSyntaxError as error:
            raise PromptError(f"prompt.template {self.name!r}, line {error.lineno}: {error.message}") from error

    def _format(self) -> tuple[Callable[[Mapping[str, Any]], str], frozenset[str]]:
        try:
            parts = list(string.Formatter().parse(self.source.removesuffix("\n")))
        except ValueError as error:
            raise PromptError(
                f"prompt.template {self.name!r}: {error}; write {{{{ and }}}} for braces that are text"
            ) from error
        for _, name, spec, conversion in parts:
            if spec or conversion:
                raise PromptError(
                    f"prompt.template {self.name!r} formats {name!r}: a .txt template takes variables as they are; "
                    "a .jinja template has filters"
                )
        names = {"extra" if name.startswith("extra.") else name for _, name, _, _ in parts if name is not None}

        def value(name: str, values: Mapping[str, Any]) -> Any:
            if name.startswith("extra."):  # looked up as a whole: no attribute of anything is reached
                return values["extra"][name.removeprefix("extra.")]
            return _Trusted(", ".join(values[name])) if name == "scores" else values[name]

        def render(values: Mapping[str, Any]) -> str:
            return "".join(
                text + ("" if name is None else self._put_in(value(name, values))) for text, name, _, _ in parts
            )

        return render, frozenset(names)


class _Trusted(str):
    """A text of the configuration, which is no data."""

    __slots__ = ()


class _Extra:
    """A row's further fields, by name alone: ``extra.items`` is a field, and no method."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def __getitem__(self, name: str) -> Any:
        return self._fields[name]

    def __str__(self) -> str:
        raise TypeError("extra stands for all further fields: name one, as in extra.category")
