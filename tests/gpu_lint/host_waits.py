"""Where the host waits for the device in an update: host_waits.json, and the command that writes it anew.

``python -m tests.gpu_lint.host_waits`` runs every case of :mod:`tests.gpu_lint.steps` and says what has changed. A file
and a function stand for a place, and a number for how often an update waits there. The cases have two micro-batches
(where prompts are not shared, five; of the warm-up, one): 2 is once a micro-batch or twice an update.

Kinds of waits: "number" (a value is asked for: item, bool, float), "size" (how many numbers come out: nonzero, a
boolean mask as an index), "copy to the host" and "copy to the device" (of memory that is not pinned, or is waited for),
"synchronize".
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
COMMAND = "python -m tests.gpu_lint.host_waits"
Waits = dict[str, dict[str, int]]


def committed() -> dict[str, Waits]:
    """By case, place and kind."""
    found: dict[str, Waits] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def by_place(waits: Counter[tuple[str, str]]) -> Waits:
    """As the file has them."""
    found: Waits = {}
    for (kind, place), times in sorted(waits.items(), key=lambda item: item[0][::-1]):
        found.setdefault(place, {})[kind] = times
    return found


def differences(want: Waits, got: Waits) -> list[str]:
    """A line for each place and kind where the numbers differ."""
    pairs = {(place, kind) for waits in (want, got) for place, kinds in waits.items() for kind in kinds}
    found = []
    for place, kind in sorted(pairs):
        before, now = (waits.get(place, {}).get(kind, 0) for waits in (want, got))
        if before != now:
            found.append(f"{place} waits for a {kind} {now} times, and not {before}")
    return found


def main(cases: Sequence[str]) -> int:
    """Write the given cases, or all."""
    from tests.gpu_lint import build

    if reason := build.reason_against():
        print(reason, file=sys.stderr)
        return 2
    os.environ["TRITON_INTERPRET"] = "1"
    build.load()
    from tests.gpu_lint import steps

    before = committed() if FILE.is_file() else {}
    # Without the cases that are no more; in the order of the list, so that a change shows as one.
    after = {name: before[name] for name in steps.CASES if name in before}
    with tempfile.TemporaryDirectory() as folder:
        model = steps.make_model(Path(folder) / "model")
        for name in cases or steps.CASES:
            got = by_place(steps.run(steps.CASES[name], model, Path(folder)).waits)
            changed = differences(before.get(name, {}), got)
            print(f"{name}: {'; '.join(changed) or 'the same'}")
            after[name] = got
    ordered = {name: after[name] for name in steps.CASES if name in after}
    FILE.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
