"""Builds and loads guard.cpp, without which a build of PyTorch without CUDA has no CUDA tensors, not even pretended."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "guard.cpp"


def _torch() -> Path:
    """Where PyTorch lies; it is not imported."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def compiler() -> str | None:
    """The C++ compiler: $CXX, or what the system calls c++, g++ or clang++."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def reason_against() -> str | None:
    """Why the lint cannot run here, or None."""
    version = runpy.run_path(str(_torch() / "version.py"))
    if version.get("cuda") or version.get("hip"):
        return "this build of PyTorch has a GPU's own code, which pretended tensors would end up in"
    if not sys.platform.startswith("linux"):
        return f"guard.cpp is built with Linux's linker options, and this is {sys.platform}"
    return None if compiler() else "no C++ compiler is here to build guard.cpp with ($CXX, c++, g++ or clang++)"


def load() -> None:
    """Compile guard.cpp (two seconds) and load it: from then on this process believes in one CUDA device.

    PyTorch must not have been imported yet: it asks once whether there is CUDA.

    Raises:
        RuntimeError: The compiler's message; or PyTorch is there.
    """
    if "torch" in sys.modules:
        raise RuntimeError("torch has been imported, and has asked whether there is CUDA")
    home = _torch()
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard.so"
        command = [str(compiler()), "-std=c++20", "-O0", "-fPIC", "-shared", f"-I{home / 'include'}"]
        command += ["-o", str(library), str(SOURCE), f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu"]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{made.stderr[:4000]}")
        for one in (home / "lib" / "libc10.so", home / "lib" / "libtorch_cpu.so", library):
            ctypes.CDLL(str(one), ctypes.RTLD_GLOBAL)
