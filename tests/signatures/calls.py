"""Our calls into a package, found in our files: the dotted name, how many arguments, and which keywords."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("real_fast", "kernels/real_kernels")
# What stands in front of a method, and of which class it is: no import says so.
OBJECTS = {
    "self._llm": "vllm.LLM",
    "self._engine": "vllm.LLM",
    "self._llm.llm_engine": "vllm.v1.engine.llm_engine.LLMEngine",
    "self._engine.llm_engine": "vllm.v1.engine.llm_engine.LLMEngine",
    "core": "vllm.v1.engine.llm_engine.LLMEngine",
    "self._group": "vllm.distributed.device_communicators.pynccl.PyNcclCommunicator",
}
# An object that a module makes when it is first asked for.
_MADE = {"vllm.platforms.current_platform.": "vllm.platforms.interface.Platform."}
# Operators are made while a program runs; those of ours have tests of their own.
_NOWHERE = "torch.ops."
_OF_VLLM = "real_fast/rollout/vllm_"


@dataclass(frozen=True)
class Call:
    """A call.

    Attributes:
        name: Of what is called: ``torch.mm``.
        place: ``file:line``.
        positional: Arguments without a name.
        keywords: Names of the others.
        open: Whether there are ``*args`` or ``**kwargs`` too, which say nothing here.
    """

    name: str
    place: str
    positional: int
    keywords: tuple[str, ...]
    open: bool


@cache
def calls(package: str) -> tuple[Call, ...]:
    """All of ours into a package."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    named = [(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()) for path in files]
    return tuple(call for text, name in named for call in calls_in(text, name, package))


def calls_in(text: str, file: str, package: str) -> Iterator[Call]:
    """Those of a file."""
    tree = ast.parse(text)
    names = _imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := _dotted(node.func, names, file)) is not None:
            if name.split(".")[0] != package or name.startswith(_NOWHERE):
                continue
            for made, of in _MADE.items():
                name = name.replace(made, of)
            starred = any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords)
            positional = sum(not isinstance(a, ast.Starred) for a in node.args)
            keywords = tuple(k.arg for k in node.keywords if k.arg is not None)
            yield Call(name, f"{file}:{node.lineno}", positional, keywords, starred)


def _imports(tree: ast.Module) -> dict[str, str]:
    """What each name of the file stands for."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def _dotted(expression: ast.expr, names: dict[str, str], file: str) -> str | None:
    if isinstance(expression, ast.Attribute):
        if file.startswith(_OF_VLLM) and (of := OBJECTS.get(ast.unparse(expression.value))):
            return f"{of}.{expression.attr}"
        before = _dotted(expression.value, names, file)
        return None if before is None else f"{before}.{expression.attr}"
    if not isinstance(expression, ast.Name):
        return None
    if file.startswith(_OF_VLLM) and expression.id == "vllm":  # what import_vllm() returns
        return "vllm"
    return names.get(expression.id)
