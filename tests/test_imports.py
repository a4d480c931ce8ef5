"""Which way imports run: down the floors of the house, never up, and never in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "real_fast"

# From the ground up; what stands on one floor may import from there (without circles) and from below.
FLOORS = (
    ("errors", "utils", "real_kernels"),
    ("attention", "config", "runs", "distributed"),
    ("types",),
    ("score",),
    ("model", "prompt"),
    ("batching", "rollout", "data"),
    ("methods", "evaluation", "reports", "planning"),
    ("training", "judging", "comparison"),
    ("__init__", "__main__", "commands", "train", "evaluate", "judge", "compare", "plan", "serve"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules():
    return {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}


def imports(path):
    """Modules of the project that a file imports, wherever in it."""
    known = modules()
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("real_fast", "real_kernels")}


def part(module):
    """The folder of a module, or the module where it lies at the top."""
    pieces = module.split(".")
    return pieces[0] if pieces[0] == "real_kernels" else pieces[1] if len(pieces) > 1 else "__init__"


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_do_not_go_up(module):
    own = FLOOR[part(module)]
    up = sorted(other for other in imports(modules()[module]) if FLOOR[part(other)] > own)
    assert not up, f"{module} (floor {own}) imports from above: {', '.join(up)}"


def test_no_circles():
    graph = {m: {o for o in imports(p) if o in modules() and o != m} for m, p in modules().items()}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for other in sorted(graph[module]):
            visit(other)
        path.pop()
        done.add(module)

    for module in sorted(graph):
        visit(module)


def test_an_upward_import_would_be_found(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from real_fast.training.update import Updater\n")
    assert imports(wrong) == {"real_fast.training.update"}
    assert FLOOR["training"] > FLOOR["methods"]


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py")))
def test_a_folder_says_what_lives_there_and_what_may_not(folder):
    text = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text(encoding="utf-8")))
    assert text and len(text.split("\n\n")) == 2 and all(part.endswith(".") for part in text.split("\n\n"))


def test_methods_are_named_in_methods_alone():
    for module, path in modules().items():
        if part(module) in ("methods", "config"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            flat = [
                e for side in sides for e in (side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side])
            ]
            names = {e.value for e in flat if isinstance(e, ast.Constant)}
            about = any(isinstance(side, ast.Attribute) and side.attr == "method" for side in sides)
            assert not (about and names), f"{module}:{node.lineno} tests a method's name"


def test_no_test_imports_another_test():
    tests = Path(__file__).resolve().parent
    for path in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            wrong = [
                name for name in names if name.startswith("tests.") and name.rpartition(".")[2].startswith("test_")
            ]
            assert not wrong, f"{path.name} imports {wrong[0]}: what tests share lies in tests/*.py beside conftest.py"
