"""A LoRA step of a random model of Qwen3-8B's shape with vLLM asleep, its peaks beside the plan.

``python -m benchmarks.lora_step OUT [--small]``, and a stage of gpu_check. Two updates are made by the trainer of
``real-fast train`` (:mod:`benchmarks.lora_run`), in a process of their own with a time limit: an end there, by a lack
of memory or a crash, is reported and ends nothing else. Where vLLM is missing, or fails before an update is done,
Transformers samples, since the trainer's half of the plan does not need it.

OUT gets ``lora-step.jsonl``, the facts, and ``lora-step.txt``, all that the process wrote.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.lora_run import LARGE, PEAKS, SMALL
from benchmarks.machine import ROOT
from benchmarks.random_model import parameters

SECONDS = 220.0  # that the whole step may take
LEAST = 60.0  # seconds under which no other engine is tried
NEEDED = ("peft", "scipy", "matplotlib", "jinja2", "yaml", "safetensors")
GIB = 2**30
# Where vLLM is to be looked for; a name, so that a test can look for one that is nowhere.
VLLM = "vllm"


def run(out: Path, small: bool, seconds: float = SECONDS) -> int:
    """Make the step, record it, and say what came of it.

    Args:
        out: Folder for the facts.
        small: A tiny model, on any device.
        seconds: That it may take.

    Returns:
        1 if something went wrong, which is printed, else 0; 0, too, where a package that it needs is missing.

    Raises:
        OSError: No folder has room for the model.
    """
    end = time.monotonic() + seconds
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"LoRA step left out: not installed here: {', '.join(missing)}", flush=True)
        return 0
    engines = ["vllm", "transformers"]
    if importlib.util.find_spec(VLLM) is None:
        print("LoRA step: vLLM asleep is left out, vllm is not installed here; Transformers samples", flush=True)
        engines = ["transformers"]
    failed = 0
    with tempfile.TemporaryDirectory(dir=room_for(2 * parameters(SMALL if small else LARGE))) as folder:
        for engine in engines:
            facts = _in_process(Path(folder), out, engine, small, end - time.monotonic())
            _record(facts, small)
            print("\n".join(text(facts, engine, small)), flush=True)
            failed += facts[-1]["what"] != "done"
            left = end - time.monotonic()
            if any(fact["what"] == "update" for fact in facts) or left < LEAST:
                break
            shutil.rmtree(Path(folder) / "run", ignore_errors=True)
    return int(failed > 0)


def command(folder: Path, facts: Path, engine: str, small: bool, others: int) -> list[str]:
    """What the process runs; see :mod:`benchmarks.lora_run`."""
    line = [sys.executable, "-m", "benchmarks.lora_run", str(folder), str(facts), engine, "--others", str(others)]
    return line + ["--small"] * small


def room_for(size: int) -> Path:
    """A folder for a model: in memory where that has room for the model four times over, else for temporary files.

    Args:
        size: Bytes of the model's files.

    Raises:
        OSError: There is none; the message says how much is needed.
    """
    shared, disk = Path("/dev/shm"), Path(tempfile.gettempdir())
    # The files, the trainer's copy on its way to the card, and vLLM's while it sleeps.
    if shared.is_dir() and shutil.disk_usage(shared).free > 1.1 * size and _available() > 4 * size:
        return shared
    if shutil.disk_usage(disk).free > 1.1 * size:
        return disk
    raise OSError(
        f"a model of {size / GIB:.0f} GiB has room neither in /dev/shm (four times that of free memory is needed) nor "
        f"in {disk}: set TMPDIR to a folder on a larger disk"
    )


def _available() -> int:
    """Bytes of memory that programs may still take; 0 where Linux does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0


def _in_process(folder: Path, out: Path, engine: str, small: bool, seconds: float) -> list[dict[str, Any]]:
    """The facts of one try; the last is {"what": "done"}, or {"what": "error"} with its "phase" and "error"."""
    file, log = out / "lora-step.jsonl", out / "lora-step.txt"
    if file.is_file():  # a line that an earlier try was cut off in ends here
        with file.open("a") as written:
            written.write("\n")
    before = _facts(file)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("a") as written:
        process = subprocess.Popen(
            command(folder, file.resolve(), engine, small, _others()),
            cwd=ROOT,
            env=environment,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # what it starts ends with it
        )
        ended = ""
        try:
            if status := process.wait(max(1.0, seconds)):
                ended = f"ended with status {status}" if status > 0 else f"ended by {_signal(-status)}"
        except subprocess.TimeoutExpired:
            ended = f"not done in {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # of a process that crashed, what it started is still there
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    facts = _facts(file)[len(before) :]
    last = facts[-1]["what"] if facts else ""
    if last == "error" or (last == "done" and not ended):
        error = facts.pop()
    else:
        error = {"what": "error", "error": ended or "ended without a word"}
    begun = [fact["phase"] for fact in facts if fact["what"] == "begin"]
    return [*facts, {"phase": begun[-1] if begun else "start", **error}]


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _facts(file: Path) -> list[dict[str, Any]]:
    """The lines of a file; one that was cut short by an end is none."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _others() -> int:
    """Bytes of the card that are taken before the process starts: by this one and whoever else is there."""
    import torch

    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def peaks(facts: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """The highest of the updates, and what was planned for it, in bytes by the names of PEAKS; unmeasured ones out."""
    found: dict[str, tuple[float, float]] = {}
    for fact in facts:
        for name, (measured, planned) in fact.get("bytes", {}).items():
            if measured is not None and measured >= found.get(name, (float("-inf"), 0.0))[0]:
                found[name] = (measured, planned)
    return found


def text(facts: Sequence[dict[str, Any]], engine: str, small: bool) -> list[str]:
    """What to print of a try: lines."""
    name, out = (SMALL if small else LARGE).name, []
    if updates := [fact for fact in facts if fact["what"] == "update"]:
        last = updates[-1]
        sleeps = ("asleep" if last["asleep"] else "awake") + " in the update"
        how = f"vLLM {sleeps}" if last["engine"] == "vllm" else "rollouts by Transformers"
        seconds = [f"{phase} {s:.1f}" for phase, s in last["seconds"].items() if phase != "step_time"]
        out.append(f"LoRA step, random {name}, {how}, {last['case']}: {last['seconds']['step_time']:.1f} s")
        out.append(f"  seconds of update {last['step']}: {', '.join(seconds)}")
        once = [f"{fact['phase']} {fact['seconds']:.1f}" for fact in facts if fact["what"] == "seconds"]
        out.append(f"  seconds before: {', '.join(once)}")
        if last["gap"] is not None:
            out.append(f"  engine and trainer differ by {last['gap']:.1e} nats a token in update {last['step']}")
        out.append(f"  {'GiB at most':<56} {'measured':>8} {'plan':>8} {'ratio':>6}")
        for key, (measured, planned) in peaks(facts).items():
            ratio = f"{measured / planned:6.2f}" if planned else "     -"
            out.append(f"  {PEAKS[key]:<56} {measured / GIB:8.2f} {planned / GIB:8.2f} {ratio}")
        if small:
            out.append("  (a tiny model: what libraries take is all that shows)")
    if facts[-1]["what"] == "error":
        end = facts[-1]
        where = f" ({end['card']})" if end.get("card") else ""
        out.append(f"LoRA step with {engine} failed in '{end['phase']}': {end['error']}{where}; see lora-step.txt")
    return out


def _record(facts: Sequence[dict[str, Any]], small: bool) -> None:
    """Into benchmarks.csv: the highest peaks, the last update's seconds."""
    from benchmarks.record import append

    updates = [fact for fact in facts if fact["what"] == "update"]
    if not updates:
        return
    last = updates[-1]
    variant = last["engine"] + (" asleep" if last["asleep"] else "")
    values: dict[str, tuple[float | None, str]] = {"seconds": (last["seconds"]["step_time"], "s")}
    values |= {f"seconds/{phase}": (s, "s") for phase, s in last["seconds"].items() if phase != "step_time"}
    for name, (measured, planned) in peaks(facts).items():
        values |= {f"{name}_bytes": (measured, "B"), f"{name}_planned_bytes": (planned, "B")}
    values |= {"device_bytes": (last["room"], "B"), "logprob_difference": (last["gap"], "nats")}
    append("lora", (SMALL if small else LARGE).name, variant, last["case"], values)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit status 1 if the step failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="benchmarks.lora_step", description="A LoRA step, its peaks beside the plan.")
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--small", action="store_true", help="a tiny model, on any device")
    parser.add_argument("--limit", type=float, default=SECONDS, help="seconds that it may take")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ["REAL_FAST_RESULTS"] = str(arguments.out.resolve())
    import torch

    if not torch.cuda.is_available() and not arguments.small:
        print("the LoRA step needs a CUDA device, and torch finds none (--small runs anywhere)", file=sys.stderr)
        return 2
    try:
        return run(arguments.out, arguments.small, arguments.limit)
    except OSError as error:
        print(f"LoRA step failed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
