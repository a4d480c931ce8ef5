"""A coverage-guided fuzzer on all that reads people's data, servers' answers and runs: an hour in all, one at a time.

Survived is a target that found nothing: no error that is not for people, no wrong result (tests/soak/targets.py), no
input that takes over 10 s or over 2 GB. What it finds is written beside the corpus, tests/soak/corpus/TARGET, as
crash-...; once mended it stays there, and tests/soak/test_hostile.py reads it in every run of the tests.

The corpus is kept small: of all that the fuzzer has tried, the inputs without which a step from one line of real_fast
to another would be missed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from benchmarks.machine import ROOT
from tests.soak.malformed import FILES, LINES, answer
from tests.soak.record import Fault, Found
from tests.soak.resumed import READ
from tests.soak.targets import ENDINGS, Targets

CORPUS = Path(__file__).parent / "corpus"
NAMES = ("readers", "rows", "prompts", "verdicts", "answers", "lines", "config", "resume")
SECONDS = 3600.0
LONGEST, SLOWEST, MEMORY = 4096, 10, 2048  # bytes of an input, seconds for it, MB of the process
KEPT = 24_000  # bytes of a target's corpus
_STATS = {
    "executions": r"stat::number_of_executed_units:\s*(\d+)",
    "executions a second": r"stat::average_exec_per_sec:\s*(\d+)",
    "slowest input (s)": r"stat::slowest_unit_time_sec:\s*(\d+)",
    "peak memory (MB)": r"stat::peak_rss_mb:\s*(\d+)",
    "edges": r"cov: (\d+)(?!.*cov: )",
    "features": r"ft: (\d+)(?!.*ft: )",
}


def run(folder: Path, share: float) -> Found:
    """Each target in a process of its own, for its part of the hour; at least 10 s."""
    if importlib.util.find_spec("atheris") is None:
        return Found(notes=["not run: atheris, the fuzzer, has no wheel for this Python (requirements/soak.txt)"])
    found = Found(
        notes=[
            f"inputs of up to {LONGEST} bytes; executions and edges are of real_fast's own Python code",
            f"the fuzzer stops an input after {SLOWEST} s by the clock, which other programs take from too; a second "
            "of the processor for a line is what the part `hostile` holds to",
        ]
    )
    for name in NAMES:
        fault = Fault(f"fuzzer: {name}")
        figures = _fuzz(name, folder / name, max(10.0, SECONDS * share / len(NAMES)), fault)
        fault.injected = max(figures["executions"], len(fault.lost))
        fault.survived = fault.injected - len(fault.lost)
        found.faults.append(fault)
        found.figures[name] = figures
    return found


def _fuzz(name: str, folder: Path, seconds: float, fault: Fault) -> dict[str, int]:
    """Fuzz one target until its time is up, again after whatever it finds; figures over all of it."""
    tried, crashes = folder / "tried", folder / "crashes"
    tried.mkdir(parents=True)
    crashes.mkdir()
    for number, data in enumerate(seeds(name)):
        (tried / f"seed-{number:03d}").write_bytes(data)
    total = dict.fromkeys(_STATS, 0)
    end, known = time.monotonic() + seconds, set[Path]()
    while (left := end - time.monotonic()) > 2:
        command = [sys.executable, "-m", "tests.soak.fuzz", name, str(tried), f"-max_total_time={left:.0f}"]
        command += [f"-max_len={LONGEST}", f"-timeout={SLOWEST}", f"-rss_limit_mb={MEMORY}", "-print_final_stats=1"]
        command += [f"-artifact_prefix={crashes}/", "-seed=1"]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment, check=False)
        said = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
        for figure, pattern in _STATS.items():
            value = int(last[1]) if (last := re.search(pattern, said, re.DOTALL)) else 0
            total[figure] = total[figure] + value if figure == "executions" else max(total[figure], value)
        new = sorted(set(crashes.iterdir()) - known)
        known |= set(new)
        for crash in new:
            kept = CORPUS / name / crash.name
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(crash, kept)
            why = re.findall(
                r"^\s*(?:=== Uncaught.*\n.*|[\w.]*(?:Error|Exception)\b.*|.*ERROR: libFuzzer.*)", said, re.M
            )
            fault.lost.append(f"{name}: {' '.join(why)[:300]}; input {crash.read_bytes()[:200]!r} ({kept.name})")
        if wrong := idle(bool(new), done.returncode, said):
            fault.lost.append(f"{name}: {wrong}: {said[-300:]}")
            break
        if len(fault.lost) >= 10:
            break
    total["corpus (inputs)"] = keep(name, tried)
    return total


def idle(found: bool, status: int, said: str) -> str | None:
    """What is wrong with a fuzzer's end, but for what it found; None for nothing."""
    if found:
        return None
    if status:
        return f"the fuzzer ended with status {status}"
    tried = re.search(_STATS["executions"], said)
    return None if tried and int(tried[1]) else "the fuzzer tried nothing"


def seeds(name: str) -> Iterable[bytes]:
    """Inputs to begin with: the corpus, and some of each kind of malformed data."""
    yield from (path.read_bytes() for path in sorted((CORPUS / name).glob("*")))
    rng = Random(0)
    if name == "readers":
        for endings, make in FILES.values():
            yield bytes([ENDINGS.index(endings[0]) if endings[0] in ENDINGS else 0]) + make(rng)[:LONGEST]
    elif name == "answers":
        yield from (answer(rng) for _ in range(20))
    elif name == "config":
        yield from (path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml")))
    elif name == "resume":
        yield from (bytes([kind]) + b'{"step": 1, "phase": "train", "n": 0}\n' for kind in range(len(READ)))
    else:
        yield from (make(rng)[:LONGEST] for make in LINES.values())


def keep(name: str, tried: Path) -> int:
    """Put into the committed corpus what of `tried` and of itself no smaller set can stand in for; returns how many."""
    files = {path.read_bytes(): path for path in sorted([*tried.iterdir(), *(CORPUS / name).glob("*")])}
    steps: dict[bytes, frozenset[Any]] = {}
    targets = make_targets()
    try:
        for data in files:
            steps[data] = _steps(targets.by_name[name], data)
    finally:
        targets.close()
    chosen = [data for data, path in files.items() if path.name.startswith("crash-")]
    missing = frozenset[Any]().union(*steps.values()).difference(*(steps[data] for data in chosen))
    size = 0
    while missing:
        best = max(steps, key=lambda data: (len(steps[data] & missing), -len(data)))
        gain = steps[best] & missing
        size += len(best)
        if not gain or size > KEPT:
            break
        chosen.append(best)
        missing -= gain
    folder = CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("[0-9]*"):
        path.unlink()
    for number, data in enumerate(data for data in chosen if not files[data].name.startswith("crash-")):
        (folder / f"{number:03d}").write_bytes(data)
    return len(chosen)


def _steps(target: Callable[[bytes], None], data: bytes) -> frozenset[Any]:
    """The steps from line to line of real_fast that an input takes."""
    found: set[Any] = set()
    last: list[int] = [0]

    def lines(frame: FrameType, event: str, _: Any) -> Any:
        if "real_fast" not in frame.f_code.co_filename:
            return None
        if event == "line":
            found.add((frame.f_code.co_filename, last[0], frame.f_lineno))
            last[0] = frame.f_lineno
        return lines

    sys.settrace(lines)
    try:
        target(data)
    except Exception:  # of an input whose fault is not mended yet
        found.add("fails")
    finally:
        sys.settrace(None)
    return frozenset(found)


def make_targets() -> Targets:
    """Targets with the small model's own tokenizer."""
    from transformers import AutoTokenizer

    from real_fast.model.smollm2 import prepare

    model = prepare()
    return Targets({"smollm2": AutoTokenizer.from_pretrained(model)}, model)


def main() -> None:
    """In the child process: python -m tests.soak.fuzz TARGET CORPUS -libfuzzer_flag=..."""
    import atheris

    name = sys.argv[1]
    targets = make_targets()
    for module in [m for n, m in sys.modules.items() if n.startswith("real_fast")]:
        for function in _functions(module):
            atheris.instrument_func(function)
    atheris.Setup([sys.argv[0], *sys.argv[2:]], targets.by_name[name])
    atheris.Fuzz()


def _functions(module: Any) -> Iterable[Any]:
    """A module's own functions, and those of its classes."""
    for value in vars(module).values():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        inside = vars(value).values() if isinstance(value, type) else (value,)
        for one in inside:
            one = getattr(one, "__func__", getattr(one, "fget", one))
            if hasattr(one, "__code__"):
                yield one


if __name__ == "__main__":
    main()
