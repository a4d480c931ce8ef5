"""Everything that only a GPU can tell, in one command, without network: ``python -m benchmarks.gpu_check OUT``.

Most important first (`STAGES`); the first six take five minutes at most, in this one process. What goes wrong in a
stage is said and hides none behind it. OUT gets ``gpu-check.tar.gz``, which is written anew after every stage and holds
everything; ``gpu-check.txt``, what was printed; ``benchmarks.csv``, ``summary.json`` and figures. Six files, however
early the command is cut off. Logs of processes, profiles and tracebacks are in the archive alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

LIMIT = 780.0  # seconds for everything
# What the tests, the plots or the peers need.
OPTIONAL = ("pytest", "hypothesis", "scipy", "matplotlib", "trl", "liger_kernel", "cut_cross_entropy", "quack", "verl")


def missing_packages() -> list[str]:
    """Of those, what this machine lacks."""
    return [name for name in OPTIONAL if importlib.util.find_spec(name) is None]


def main() -> int:
    """Run what fits into the time. Exit status 1 if something went wrong in a stage, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_check", description="Tests and benchmarks on a GPU.")
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--small", action="store_true", help="tiny shapes, on any device: does the command work?")
    parser.add_argument("--attention", default="auto", choices=("auto", "sdpa", "varlen", "flex"))
    parser.add_argument("--no-tests", action="store_true", help="without the tests marked gpu")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for everything (default: %(default)g)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ["REAL_FAST_RESULTS"] = str(arguments.out.resolve())

    import torch

    from benchmarks.gpu.order import stages
    from benchmarks.gpu.stages import Check, run

    if not torch.cuda.is_available() and not arguments.small:
        print(
            "gpu-check needs a CUDA device, and torch finds none (--small runs tiny shapes anywhere)", file=sys.stderr
        )
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    end = time.monotonic() + arguments.limit
    if missing := missing_packages():
        print(f"not installed here: {', '.join(missing)}", flush=True)
    with TemporaryDirectory(prefix="gpu-check-") as details:
        out = arguments.out.resolve()
        check = Check(out, Path(details), device, arguments.small, end, arguments.attention)
        return run(check, [stage for stage in stages() if not (arguments.no_tests and stage.name == "tests")])


if __name__ == "__main__":
    sys.exit(main())
