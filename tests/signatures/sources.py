"""Signatures of a package's functions and classes, read from its files: nothing is imported, or need be installed.

Names are followed through imports (``from a import b``, ``from a import *``, and vLLM's table of lazy ones). What
PyTorch has in C++ is looked up in its ``.pyi`` files, where a function has a signature for each overload.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

# Where PyTorch says what its C++ functions and classes take.
_STUBS = {"torch": ("torch._C._VariableFunctions", "torch._C")}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Definition(NamedTuple):
    """A class, or a function with its overloads, and the module that it stands in."""

    module: str
    nodes: list[ast.FunctionDef | ast.AsyncFunctionDef] | ast.ClassDef


class Sources:
    """The files of a package.

    Args:
        root: The folder that holds the package's folder: site-packages, or an unpacked wheel.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._tree = cache(self._read)

    def signatures(self, name: str) -> list[str]:
        """What ``name(...)`` takes, a text for each overload; empty where there is no such name or no signature.

        Args:
            name: From the package's name on: ``torch.mm``, ``vllm.LLM.generate``. Of a method, `self` is left out.
        """
        found, method = self._find(name)
        return self._texts(found, method) if found else []

    def _find(self, name: str) -> tuple[Definition | None, bool]:
        """What a dotted name stands for, and whether a class holds it."""
        parts = name.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:cut])
            if self._tree(module) is not None and (found := self._member(module, parts[cut:], frozenset())):
                return found, len(parts) - cut > 1
        return None, False

    def _texts(self, found: Definition, method: bool) -> list[str]:
        if isinstance(found.nodes, ast.ClassDef):
            return self._of_class(found)
        marked = [f for f in found.nodes if _decorated(f, "overload")]
        return [_text(f, method and not _decorated(f, "staticmethod")) for f in marked or found.nodes]

    def _read(self, module: str) -> tuple[Path, ast.Module] | None:
        base = self.root.joinpath(*module.split("."))
        for path in (base.with_suffix(".pyi"), base / "__init__.py", base.with_suffix(".py"), base / "__init__.pyi"):
            if path.is_file():
                return path, ast.parse(path.read_text(encoding="utf-8"))
        return None

    def _member(self, module: str, path: list[str], seen: frozenset[tuple[str, str]]) -> Definition | None:
        """What a module knows under a name, or an attribute of it."""
        first, *rest = path
        parsed = self._tree(module)
        if parsed is None or (module, first) in seen:
            return None
        seen |= {(module, first)}
        found = _defined(module, parsed[1], first) or self._imported(module, *parsed, first, seen)
        for stub in _STUBS.get(module, ()):
            found = found or self._member(stub, [first], seen)
        for attribute in rest:
            found = self._attribute(found, attribute) if found else None
        return found

    def _imported(
        self, module: str, file: Path, tree: ast.Module, name: str, seen: frozenset[tuple[str, str]]
    ) -> Definition | None:
        stars = []
        for statement in _statements(tree):
            if isinstance(statement, ast.ImportFrom):
                source = _absolute(module, file, statement)
                names = [a.name for a in statement.names if (a.asname or a.name) == name]
                stars += [source for a in statement.names if a.name == "*"]
                if names and (found := self._member(source, names, seen)):
                    return found
            value = getattr(statement, "value", None)
            for key, at in zip(value.keys, value.values, strict=True) if isinstance(value, ast.Dict) else ():
                if isinstance(key, ast.Constant) and key.value == name and isinstance(at, ast.Constant):
                    where, _, what = str(at.value).partition(":")  # vLLM's: imported when it is first used
                    return self._member(module + where, [what], seen) if what else None
        return next((hit for source in stars if (hit := self._member(source, [name], seen))), None)

    def _bases(self, of: Definition) -> Iterator[Definition]:
        """The classes that it derives from, as far as they are in this package."""
        assert isinstance(of.nodes, ast.ClassDef)
        for base in of.nodes.bases:
            path = ast.unparse(base).split("[")[0].split(".")
            if path == [of.nodes.name]:
                continue
            if found := self._member(of.module, path, frozenset()) or self._find(".".join(path))[0]:
                yield found

    def _attribute(self, of: Definition, name: str) -> Definition | None:
        if not isinstance(of.nodes, ast.ClassDef):
            return None
        own = _defined(of.module, of.nodes, name)
        return own or next((hit for base in self._bases(of) if (hit := self._attribute(base, name))), None)

    def _of_class(self, of: Definition) -> list[str]:
        """What makes an object: ``__init__`` or ``__new__``, or the fields of a dataclass and its like."""
        for maker in ("__init__", "__new__"):
            if (found := self._attribute(of, maker)) is not None:
                return self._texts(found, method=True)
        fields = self._fields(of)
        return [", ".join(f"{name}{default}" for name, default in fields.items())] if fields else []

    def _fields(self, of: Definition) -> dict[str, str]:
        assert isinstance(of.nodes, ast.ClassDef)
        found: dict[str, str] = {}
        for base in self._bases(of):
            if isinstance(base.nodes, ast.ClassDef):
                found |= self._fields(base)
        for s in of.nodes.body:
            if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name) and not s.target.id.startswith("_"):
                kind = ast.unparse(s.annotation)
                there = s.value is not None or "NotRequired" in kind
                if "ClassVar" not in kind and "init=False" not in (ast.unparse(s.value) if s.value else ""):
                    found[s.target.id] = "=..." if there else ""
        # Those without a default first: a dataclass may have them behind others that are for keywords alone.
        return dict(sorted(found.items(), key=lambda field: field[1]))


def _statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Of a module or a class, those under ``if``, ``try`` and ``else`` too."""
    for part in ("body", "orelse"):
        for statement in getattr(tree, part, ()):
            yield statement
            if isinstance(statement, ast.If | ast.Try):
                yield from _statements(statement)


def _defined(module: str, tree: ast.AST, name: str) -> Definition | None:
    named = [s for s in _statements(tree) if isinstance(s, (*_FUNCTIONS, ast.ClassDef)) and s.name == name]
    classes = [s for s in named if isinstance(s, ast.ClassDef)]
    if classes:
        return Definition(module, classes[-1])
    functions = [s for s in named if isinstance(s, _FUNCTIONS)]
    return Definition(module, functions) if functions else None


def _decorated(function: ast.FunctionDef | ast.AsyncFunctionDef, by: str) -> bool:
    return any(by in ast.unparse(decorator) for decorator in function.decorator_list)


def _text(function: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> str:
    """Names, kinds and whether there are defaults: annotations and the defaults themselves may change as they like."""
    a = function.args
    first = len(a.posonlyargs) + len(a.args) - len(a.defaults)
    parts: list[str] = []
    for i, one in enumerate([*a.posonlyargs, *a.args]):
        if i or not method:
            parts.append(one.arg + ("=..." if i >= first else ""))
        if a.posonlyargs and i == len(a.posonlyargs) - 1 and parts:
            parts.append("/")
    if a.vararg or a.kwonlyargs:
        parts.append(f"*{a.vararg.arg}" if a.vararg else "*")
    parts += [k.arg + ("" if d is None else "=...") for k, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    return ", ".join([*parts, *([f"**{a.kwarg.arg}"] if a.kwarg else [])])


def _absolute(module: str, file: Path, statement: ast.ImportFrom) -> str:
    if not statement.level:
        return statement.module or ""
    package = module.split(".")
    if file.stem != "__init__":
        package = package[:-1]
    package = package[: len(package) - statement.level + 1]
    return ".".join([*package, *([statement.module] if statement.module else [])])
