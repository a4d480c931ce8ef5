"""A long run: 300 updates of a tiny model with vLLM's server on the CPU; memory flat, no slow update without a reason.

An update is slow if it takes over twice the median, and a second more. The run's log must say why, and the phase that
grew is no reason: work that grew with it is, or other programs, or that it waited for a server or a disk.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.machine import ROOT
from real_fast.utils.jsonio import read_jsonl
from tests.helpers import free_port
from tests.soak.memory import Watch, draw, not_flat, thinned
from tests.soak.models import make_judge
from tests.soak.record import Fault, Found

STEPS = 300
PLOT = ROOT / "docs" / "reliability-memory.png"
_LIMIT_S = 3000
# In a line of real_fast.runs.slow_steps: what an update took long by, beside the phase in which it did.
_CAUSE = re.compile(r"\btokens (a|of|through) |other programs had them|\btime/(wait|sync|save|eval) ")
_FIRST = 10  # updates that have nothing to be compared with: what is allocated and compiled once is theirs
SETTINGS = """
data: {train: "synthetic:train", eval: "synthetic:eval", max_train: 400, max_eval: 8}
scale: {phrase: "Score: "}
prompt: {template: short, system: Grade., max_tokens: 512}
rollout: {prompts_per_step: 6, group_size: 4, max_tokens: 24, max_num_seqs: 24, check_every: 20}
optim: {lr: 1.0e-4}
train: {precision: fp32, device: cpu, micro_batch_tokens: 4096}
eval: {bootstrap: 10, every: 100, on_start: false}
save: {every: 50, keep: 2}
"""


def run(folder: Path, share: float) -> Found:
    """Train for `share` of 300 updates beside a server. Needs vLLM and uvicorn."""
    if any(importlib.util.find_spec(name) is None for name in ("vllm", "uvicorn")):
        return Found(notes=["The long run was not made: vLLM is not installed."])
    steps = max(12, round(STEPS * share))
    model = make_judge(folder / "model")
    (folder / "run.yaml").write_text(SETTINGS, encoding="utf-8")
    url = f"http://127.0.0.1:{free_port()}"
    flags = ["--config", str(folder / "run.yaml"), "--model", str(model)]
    flags += ["--rollout.engine", "vllm-server", "--rollout.url", url, "--output", str(folder / "run")]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-m", "real_fast"]
    processes = []
    try:
        for name, more in (("serve", []), ("train", ["--train.steps", str(steps)])):
            with (folder / f"{name}.log").open("wb") as log:
                # Sessions of their own, so that all that vLLM starts can be ended.
                processes.append(
                    subprocess.Popen(
                        [*command, name, *flags, *more],
                        env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                    )
                )  # fmt: skip
            if name == "serve":
                _wait_for(url, processes[0])
        server, trainer = processes
        with Watch({"the trainer": trainer.pid, "vLLM's server": server.pid}, every=1.0) as watch:
            status = trainer.wait(_LIMIT_S)
        text = (folder / "train.log").read_text(errors="replace")
        if status:
            raise RuntimeError(f"the long run ended with status {status}: {text[-2000:]}")
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, 15)
        for process in processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
    return _found(folder / "run", text, watch, steps)


def _found(output: Path, log: str, watch: Watch, steps: int) -> Found:
    lines = [line for line in read_jsonl(output / "metrics.jsonl") if line["phase"] == "real"]
    times = {line["step"]: line["step_time"] for line in lines}
    usual = median(times.values())
    slow = sorted(step for step, seconds in times.items() if seconds > max(2 * usual, usual + 1.0))
    said = {int(number): text for number, text in re.findall(r"update (\d+) took (.*)", log)}
    faults = [Fault("long: updates made"), Fault("long: memory"), Fault("long: slow updates explained")]
    for step in range(1, steps + 1):
        faults[0].count(None if step in times else f"update {step} is not in metrics.jsonl")
    for name, samples in watch.samples.items():
        started = [one for one in samples if one[0] > 0.1 * samples[-1][0]]  # imports and the first updates
        faults[1].count(not_flat(name, started))
    for step in (step for step in slow if step > _FIRST):
        faults[2].count(unexplained(step, times[step], said.get(step)))
    draw(watch.samples, PLOT)
    return Found(
        faults,
        {
            "updates": len(times),
            "seconds an update, median": round(usual, 2),
            "seconds an update, longest": round(max(times.values()), 2),
            "updates over twice the median": sum(seconds > 2 * usual for seconds in times.values()),
            "slow updates, a second above it too": [
                f"update {step} took {said.get(step, f'{times[step]:.1f} s')}" for step in slow
            ],
            **{f"memory of {name}, seconds:MiB": thinned(samples) for name, samples in watch.samples.items()},
        },
    )


def unexplained(step: int, seconds: float, line: str | None) -> str | None:
    """What is wrong with what the log says of a slow update; None for nothing."""
    if line is None:
        return f"update {step}: {seconds:.1f} s, no line in the log"
    return None if _CAUSE.search(line) else f"update {step} took {line}: no cause is said"


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    from real_fast.errors import RolloutServerError
    from real_fast.rollout.vllm_client import ServerClient

    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and server.poll() is None:
        try:
            ServerClient(url).get("/weight_info")
            return
        except RolloutServerError:
            time.sleep(1)
    raise RuntimeError("vLLM's server did not start")
