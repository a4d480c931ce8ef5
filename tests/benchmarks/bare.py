"""A Python environment with less than the tests' own: some distributions and what they depend on, by symbolic links."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

# Runs at the start of every Python that finds it: what pip installed is taken off the path, whoever started it.
_SITE = """
import os, sys
kept = os.environ["PYTHONPATH"].split(os.pathsep)
sys.path[:] = [p for p in sys.path if p in kept or (p.startswith(sys.base_prefix) and "-packages" not in p)]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
"""


def closure(names: Sequence[str]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions and what they depend on here, without extras; what is not installed is left out."""
    found: dict[str, importlib.metadata.Distribution] = {}
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if name in found:
            continue
        found[name] = distribution
        for requirement in distribution.requires or ():
            if "extra ==" not in requirement:
                todo.append(re.split(r"[ ;<>=!~(\[]", requirement, maxsplit=1)[0])
    return found


def make(folder: Path, names: Sequence[str], root: Path) -> dict[str, str]:
    """Make the environment in `folder`, and return the environment variables that a Python in it is started with.

    Args:
        folder: An empty folder.
        names: The distributions.
        root: The project's, whose packages are there too.
    """
    packages = folder / "packages"
    packages.mkdir()
    for distribution in closure(names).values():
        for file in distribution.files or ():
            top = file.parts[0]
            source = Path(str(distribution.locate_file(top)))
            if top not in ("..", "bin", "__pycache__") and source.exists() and not (packages / top).is_symlink():
                (packages / top).symlink_to(source)
    start = folder / "start"
    start.mkdir()
    (start / "sitecustomize.py").write_text(_SITE, encoding="utf-8")
    path = [start, packages, root, root / "kernels"]
    assert packages != Path(sysconfig.get_path("purelib"))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST_"))}
    return kept | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
