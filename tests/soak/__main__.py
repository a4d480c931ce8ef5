"""make soak: faults injected, and what a run loses by them; the figures go to docs/reliability.json.

python -m tests.soak                      all parts, in under 3 hours on two cores
python -m tests.soak kills disk           some of them; the sections of others stay as they are
python -m tests.soak --share 0.1          a tenth of the work, for a look ("--output FILE" for elsewhere)
python -m tests.soak --list               what there is
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.soak.record import RESULT, Fault, Found, keep

# Modules here, each with run(folder, share) -> Found, where share 1.0 is the whole work.
PARTS = ("suites", "kills", "disk", "hostile", "service", "long", "fuzz")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit status 1 where anything was lost, or a part could not be made."""
    parser = argparse.ArgumentParser(
        prog="tests.soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; none is all")
    parser.add_argument("--share", type=float, default=1.0, help="of the work, from 0 to 1")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args(argv)
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"no part is called {unknown[0]!r}; there are {', '.join(PARTS)}")
    wrong = 0
    for part in args.parts or PARTS:
        module = importlib.import_module(f"tests.soak.{part}")
        if args.list:
            print(f"{part}: {(module.__doc__ or '').splitlines()[0]}")
            continue
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"soak-{part}-") as folder:
            found = _made(module.run, Path(folder), args.share)
        keep(part, found, time.monotonic() - start, args.share, args.output)
        for fault in found.faults:
            print(f"{part}: {fault.kind}: {fault.survived} of {fault.injected}", *fault.lost, sep="\n    ", flush=True)
        if not found.faults:
            print(f"{part}: nothing was injected:", *found.notes, sep="\n    ", flush=True)
        wrong += bool(found.lost or not found.faults)
    return 1 if wrong else 0


def _made(run: Callable[[Path, float], Found], folder: Path, share: float) -> Found:
    """What a part finds; of one that fails, that it did: the others are made all the same."""
    try:
        return run(folder, share)
    except Exception as error:
        traceback.print_exc()
        fault = Fault("the part itself")
        fault.count(f"{type(error).__name__}: {error}")
        return Found([fault])


if __name__ == "__main__":
    sys.exit(main())
