"""What the pages name exists: links and their headings, commands, make targets, configurations, files of the code."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import E2E, SLOW

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / f"{name}/README.md" for name in ("benchmarks", "examples")),
    *sorted((ROOT / "docs").glob("*.md")),
]
_OURS = ("benchmarks", "examples", "experiments", "kernels", "real_fast", "tests", "tools")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", read(page), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def named_paths(page: Path) -> set[str]:
    """Files and folders of this repository in backticks, and the folders of README's tree."""
    text = read(page)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    owners = "|".join((*_OURS, "configs", "docs", "requirements"))
    found = {span for span in spans if re.fullmatch(rf"(?:{owners})/[\w./-]*", span)}
    for tree in re.findall(r"^```\n(real_fast/ .*?)^```", text, flags=re.S | re.M):
        top = ""
        for line in tree.splitlines():
            names = [name for name in line.split("  ")[0 if line[0] != " " else 1].split() if name.endswith("/")]
            top = names[0] if line[0] != " " else top
            found |= {name if line[0] != " " else top + name for name in names}
    return {path.rstrip("/") for path in found if not re.search(r"[A-Z]{3,}", Path(path).name)}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(read(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pages
def test_modules_that_are_run_exist(page: Path) -> None:
    for module in re.findall(r"python -m ([\w.]+)", read(page)):
        if module.split(".")[0] in _OURS:
            file = ROOT / module.rstrip(".").replace(".", "/")
            assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file(), module
        else:
            assert find_spec(module), module


@pages
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", read(ROOT / "Makefile"), flags=re.M))
    code = " \n".join(re.findall(r"^```.*?^```|`[^`\n]+`", read(page), flags=re.S | re.M))
    named = set(re.findall(r"(?:^|`|\n)make ([a-z][a-z-]*)", code))
    assert named <= targets


def test_what_make_check_leaves_out_exists() -> None:
    """A test file that is moved keeps its name, or its new one goes into the list."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    text = "\n".join(map(read, files))
    assert not {name for name in E2E | SLOW if name not in {file.stem for file in files} and f"def {name}(" not in text}


@pages
def test_configurations_exist(page: Path) -> None:
    for name in re.findall(r"(?:configs|experiments)/[\w-]+\.yaml", read(page)):
        assert (ROOT / name).is_file(), name


@pages
def test_files_of_the_code_exist(page: Path) -> None:
    missing = {path for path in named_paths(page) if not (ROOT / path).exists()}
    assert not missing


def test_the_index_has_every_page() -> None:
    index = re.findall(r"^\| \[([\w.-]+)\]\(\1\) \|", read(ROOT / "docs" / "README.md"), flags=re.M)
    pages = {page.name for page in PAGES if page.parent == ROOT / "docs"} - {"README.md"}
    assert sorted(index) == sorted(pages)


def test_the_readme_is_short() -> None:
    """It says what this is and how to start; everything else is a page of docs/."""
    assert len(read(ROOT / "README.md").splitlines()) <= 150
