"""A judge as a service: 500 requests, 50 at a time, again and again for ten minutes, against examples/serve.py.

A request survives if it is answered once, with the grade that the judge gives it alone; one that cannot be graded, if
it gets status 422 and why; one that is cancelled, if its place is free again: at the end nobody waits, and most of the
cancelled ones were never graded. Memory must be flat.

python -m tests.soak.service FOLDER PORT    the example with a judge in float32, and a route that says how it is
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from tests.helpers import free_port, serve_example
from tests.soak.memory import Watch, not_flat, thinned
from tests.soak.models import make_judge
from tests.soak.record import Fault, Found

MINUTES = 10
WAVE, AT_ONCE = 500, 50
SEEDS = 2
# A grade must be that of the judge alone up to sums in another order.
CLOSE = 1e-4
ROWS = [
    {"instruction": f"Name {n} {what}.", "response": f"{what} {i}", "rubric": "Are they right?"}
    for n, what in (("five", "fruits"), ("three", "rivers"), ("two", "metals"))
    for i in range(8)
]
BAD = [
    ({"instruction": "Name a fruit.", "response": " ", "rubric": "Is it?"}, "response is empty"),
    ({"instruction": "Name a fruit.", "response": "pear " * 400, "rubric": "Is it?"}, "too long"),
    ({"response": "A pear."}, "instruction"),
]


@dataclass
class Tally:
    """What became of the requests."""

    faults: dict[str, Fault] = field(default_factory=dict)
    answered: int = 0  # that were to be graded
    cancelled: int = 0
    seconds: list[float] = field(default_factory=list)

    def count(self, kind: str, problem: str | None) -> None:
        self.faults.setdefault(kind, Fault(kind)).count(problem)


def run(folder: Path, share: float) -> Found:
    """Serve, ask for `share` of ten minutes, and look at what is left. Needs aiohttp, FastAPI and uvicorn."""
    missing = [name for name in ("aiohttp", "fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        return Found(notes=[f"The service was not tried: {', '.join(missing)} is not installed."])
    judge, port = make_judge(folder / "judge"), free_port()
    expected = _expected(judge)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.soak.service", str(judge), str(port)]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        tally, figures = asyncio.run(_ask(server, f"http://127.0.0.1:{port}", expected, MINUTES * 60 * share))
        server.terminate()
        status = server.wait(60)
        tally.count("service: SIGTERM at the end", None if status in (0, -15) else f"exit status {status}")
    except Exception as error:
        raise RuntimeError(f"the service failed: {(folder / 'log').read_text(errors='replace')[-2000:]}") from error
    finally:
        server.kill()
        server.wait()
    text = (folder / "log").read_text(errors="replace")
    tally.count(
        "service: tracebacks in the log", text[text.index("Traceback") :][:500] if "Traceback" in text else None
    )
    return Found(list(tally.faults.values()), figures)


def _expected(folder: Path) -> dict[tuple[int, int], tuple[float, str]]:
    """Score and feedback of every row and seed, graded alone."""
    from real_fast import Judge

    with Judge(folder, precision="fp32", engine="transformers") as judge:
        found = {(i, seed): judge.grade(**row, seed=seed) for i, row in enumerate(ROWS) for seed in range(SEEDS)}
    return {key: (float(grade.score or 0), grade.feedback or "") for key, grade in found.items()}


async def _ask(
    server: subprocess.Popen[bytes], url: str, expected: dict[tuple[int, int], tuple[float, str]], seconds: float
) -> tuple[Tally, dict[str, Any]]:
    import aiohttp

    tally, draw = Tally(), random.Random(0)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=AT_ONCE)) as session:
        await _started(session, server, url)
        with Watch({"service": server.pid}, every=max(0.2, min(2.0, seconds / 60))) as watch:
            end = time.monotonic() + seconds
            while time.monotonic() < end or not tally.seconds:
                gate = asyncio.Semaphore(AT_ONCE)

                async def one(number: int, gate: asyncio.Semaphore = gate) -> None:
                    async with gate:
                        try:
                            await _one(session, url, expected, tally, number)
                        except aiohttp.ClientError as error:
                            tally.count("service: request, answered once and right", f"not answered: {error}")

                await asyncio.gather(*(one(draw.randrange(10**9)) for _ in range(WAVE)))
        state = await _settled(session, url)
    tally.count("service: places that are free at the end", None if not state["waiting"] else f"{state} at the end")
    tally.count("service: memory", not_flat("the service", watch.samples["service"]))
    spared = tally.cancelled - max(0, state["graded"] - tally.answered)
    problem = None if spared > tally.cancelled / 2 else f"only {spared} of {tally.cancelled} were not graded for nobody"
    tally.count("service: cancelled requests are not graded", problem)
    percentiles = sorted(tally.seconds)
    return tally, {
        "requests a second": round(tally.answered / seconds, 1),
        **{
            f"latency, {name} (ms)": round(1000 * percentiles[min(len(percentiles) - 1, int(len(percentiles) * p))], 1)
            for name, p in (("median", 0.5), ("95 %", 0.95), ("99 %", 0.99), ("longest", 1.0))
        },
        "cancelled": tally.cancelled,
        "cancelled, and never graded": spared,
        "memory of the service, seconds:MiB": thinned(watch.samples["service"]),
    }


async def _one(session: Any, url: str, expected: Any, tally: Tally, number: int) -> None:
    """A request of a kind that `number` draws: nine in ten good ones, the others bad, or cancelled on the way."""
    draw = random.Random(number)
    kind = draw.random()
    if kind < 0.05:
        row, why = draw.choice(BAD)
        async with session.post(f"{url}/grade", json=row) as answer:
            text = await answer.text()
        fine = answer.status == 422 and why in text
        tally.count("service: request that cannot be graded", None if fine else f"{row}: {answer.status} {text[:200]}")
        return
    place, seed = draw.randrange(len(ROWS)), draw.randrange(SEEDS)
    body = {**ROWS[place], "seed": seed}
    if kind < 0.10:
        try:
            answered = await asyncio.wait_for(_post(session, url, body), draw.choice([0.001, 0.01, 0.05]))
        except TimeoutError:
            tally.cancelled += 1
        else:
            tally.answered += 1
            tally.count("service: request, answered once and right", _wrong(answered, expected, place, seed))
        return
    start = time.monotonic()
    answered = await _post(session, url, body)
    tally.seconds.append(time.monotonic() - start)
    tally.answered += 1
    tally.count("service: request, answered once and right", _wrong(answered, expected, place, seed))


def _wrong(answered: tuple[int, Any], expected: Any, place: int, seed: int) -> str | None:
    (status, answer), (score, feedback) = answered, expected[place, seed]
    fine = status == 200 and answer["feedback"] == feedback and abs(answer["score"] - score) < CLOSE
    return None if fine else f"row {place}, seed {seed}: {status} {str(answer)[:200]}, not {score}"


async def _post(session: Any, url: str, body: Any) -> tuple[int, Any]:
    async with session.post(f"{url}/grade", json=body) as answer:
        return answer.status, await answer.json()


async def _started(session: Any, server: subprocess.Popen[bytes], url: str) -> None:
    import aiohttp

    for _ in range(600):
        if server.poll() is not None:
            raise RuntimeError("the service did not start")
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get(f"{url}/state"):
                return
        await asyncio.sleep(0.2)
    raise RuntimeError("the service did not start within two minutes")


async def _settled(session: Any, url: str) -> dict[str, int]:
    """How the service is when it has had two seconds to come to rest."""
    await asyncio.sleep(2)
    async with session.get(f"{url}/state") as answer:
        return dict(await answer.json())


def serve(folder: str, port: int) -> None:
    """The example with a route that says how many requests wait, and how many prompts were graded."""
    import uvicorn

    from real_fast import Judge

    graded: Counter[str] = Counter()

    def load() -> Judge:
        judge = Judge(folder, precision="fp32", engine="transformers")
        assert judge._engine is not None
        generate = judge._engine.generate

        def counted(prompts: Any, sampling: Any) -> Any:
            graded["prompts"] += len(prompts)
            return generate(prompts, sampling)

        judge._engine.generate = counted  # type: ignore[method-assign]
        return judge

    app = serve_example().make_app(load)

    @app.get("/state")
    def state() -> dict[str, int]:
        return {"waiting": len(app.state.judge._waiting._rows), "graded": graded["prompts"]}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
