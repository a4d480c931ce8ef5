"""kill -9 at random moments of a run: resumed, it ends as the run that nobody disturbed, to the last bit.

Survived is: every process ended, ``--resume`` ended with status 0, and weights, the checkpoints that are left,
metrics.jsonl, rollouts.jsonl, evaluations and summary are those of the undisturbed run, but for times; nothing
half-written is left beside them. In float32, on one thread; runs on ranks are compared with an undisturbed one on as
many. Runs are killed in a phase, a random part of its length in, or before a random change of their folder (a file
opened for writing, renamed, removed), which is the same place every time. A third are killed again while they resume.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from real_fast.data.synthetic import generate
from real_fast.utils.jsonio import write_jsonl
from tests.golden.trajectories import make_model
from tests.soak.launch import Ended, Kill, attempt, side_by_side
from tests.soak.launched import killed_and_resumed
from tests.soak.record import Found, by_kind
from tests.soak.same_run import differences

_SETTINGS = """
scale: {phrase: "Score: "}
prompt: {template: short, system: Grade.}
rollout: {engine: transformers, prompts_per_step: 2, group_size: 2, max_tokens: 8, log_every: 1, log_prompts: 9}
supervised: {prompts_per_step: 2, feedbacks_per_prompt: 2}
objective: {kl_coef: 0.1}
warmup: {steps: 2, batch_size: 2, lr: 1.0e-3}
optim: {lr: 3.0e-4, lr_warmup_steps: 1, schedule: cosine}
train: {steps: 4, precision: fp32}
eval: {bootstrap: 10, every: 2}
save: {every: 1, keep: 2}
"""
METHODS = {
    "real": ("--save.background", "always", "--report_to", "trackio"),
    "sft": ("--method", "sft", "--warmup.steps", "0", "--save.background", "never"),
    "tract": ("--method", "tract", "--warmup.steps", "0", "--rollout.max_tokens", "24", "--save.background", "always"),
    "lora": ("--train.lora.r", "4", "--save.merge", "true", "--save.background", "always"),
}
# How many of the kills of one method on one number of processes come before a change of the folder.
_CHANGES = 3
# Processes, whether all are killed, and a seed: runs through their real launchers, which take 20 s each.
_LAUNCHES = ((1, True, 0), (1, True, 1), (1, True, 2), (2, False, 3), (2, False, 4), (2, True, 5))
# Kinds for the page: several phases are one to a reader.
_KINDS = {"writing a checkpoint": "checkpoint", "writing final/": "final save", "claim": "load", "": "change of a file"}


@dataclass(frozen=True)
class Case:
    """One run that is killed once or twice.

    Attributes:
        method: Of :data:`METHODS`.
        size: Processes.
        kills: Each in another attempt; the attempts behind the first resume.
        seed: Of the plan, for whoever wants it again.
    """

    method: str
    size: int
    kills: tuple[Kill, ...]
    seed: str


def run(folder: Path, share: float) -> Found:
    """About 80 runs on a share of 1.0, one at least for every phase of every method, on one process and on two."""
    setup(folder)
    sizes = (1, 2)
    undisturbed = [(method, size) for size in sizes for method in METHODS]
    if share < 0.5:
        undisturbed = [("real", 1), ("real", 2)]
    known = dict(
        zip(undisturbed, side_by_side([partial(_undisturbed, folder, *one) for one in undisturbed]), strict=True)
    )
    cases = [case for one in undisturbed for case in plan(*one, known[one])]
    random.Random("kills").shuffle(cases)
    cases = cases[: max(1, round(share * len(cases)))]
    done = side_by_side([partial(outcome, folder, case, number) for number, case in enumerate(cases)])
    launches = [partial(_launched, folder, *one) for one in (_LAUNCHES if share >= 0.5 else ())]
    return found(cases, done, side_by_side(launches))


def _launched(folder: Path, size: int, all_ranks: bool, seed: int) -> tuple[str, str | None]:
    output, whole = folder / f"launched-{size}-{seed}", "all" if all_ranks else "one rank"
    problem = killed_and_resumed(
        flags(folder, "lora", output), output, folder / f"lora-{size}", size, all_ranks, seed
    )  # fmt: skip
    return f"torchrun with {size} ranks, {whole}" if size > 1 else "the command itself, one process", problem


def setup(folder: Path) -> None:
    """The model and the rows of all runs."""
    make_model(folder / "model")
    for name, size in (("train", 12), ("eval", 3)):
        write_jsonl(folder / f"{name}.jsonl", generate(size, 2, seed=0, which=name))
    rows = {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")}
    (folder / "run.yaml").write_text(f"data: {json.dumps(rows)}\n{_SETTINGS}", encoding="utf-8")


def flags(folder: Path, method: str, output: Path) -> list[str]:
    """The command line of a run."""
    start = ["--config", str(folder / "run.yaml"), "--model", str(folder / "model"), "--output", str(output)]
    return [*start, *METHODS[method]]


def _undisturbed(folder: Path, method: str, size: int) -> Ended:
    output = folder / f"{method}-{size}"
    log = folder / f"{method}-{size}.log"
    ended = attempt(flags(folder, method, output), output, log, size)
    if ended.problem or any(ended.statuses):
        raise RuntimeError(f"the undisturbed run {method} on {size} ended with {ended}: {_tail(log)}")
    return ended


def plan(method: str, size: int, known: Ended) -> Iterator[Case]:
    """The runs to be killed of one method on so many processes, by what the undisturbed one did."""
    phases = list(dict.fromkeys(name for name, _ in known.phases))
    for number, phase in enumerate([*phases, *[""] * _CHANGES]):
        seed = f"{method}, {size}, {phase or number}"
        rng = random.Random(seed)
        kills = [_kill(rng, phase, size, known)]
        if rng.random() < 1 / 3:
            second = rng.choice(["load", "claim", ""])
            second = next((name for name in phases if name.endswith(second)), "") if second else ""
            kills.append(_kill(rng, second, size, known, resumed=True))
        yield Case(method, size, tuple(kills), seed)


def _kill(rng: random.Random, phase: str, size: int, known: Ended, resumed: bool = False) -> Kill:
    victims = (0,) if size == 1 else rng.choice([(0,), (1,), (0, 1)])
    signalled = rng.random() < 0.5
    if not phase:
        # A resumed run makes the more changes at its beginning, where it takes the folder over.
        most = min(20, known.changes) if resumed else known.changes
        return Kill("", rng.randint(1, max(1, most)), 0.0, (0,), signalled)
    lengths = [seconds for name, seconds in known.phases if name == phase]
    at = 1 if resumed else rng.randint(1, len(lengths))
    return Kill(phase, at, 0.9 * rng.random() * lengths[at - 1], victims, signalled)


@dataclass
class Outcome:
    """What became of a case.

    Attributes:
        killed: Those of its kills that happened.
        during: What each of them hit, as :attr:`Ended.during` says it.
        problem: What was lost.
        alone: Seconds that ranks took to end alone.
    """

    killed: list[Kill]
    during: list[str]
    problem: str | None
    alone: list[float]


def outcome(folder: Path, case: Case, number: int) -> Outcome:
    """Kill a run, resume it to its end and compare; what it left is removed where nothing was lost."""
    output, log = folder / f"case-{number}", folder / f"case-{number}.log"
    argv = flags(folder, case.method, output)
    killed: list[Kill] = []
    during: list[str] = []
    alone: list[float] = []
    problem: str | None = None
    for kill in (*case.kills, None):
        if (output / "summary.json").is_file() and not (output / ".lock").exists():
            break
        more = ["--resume"] if killed else []
        said = log.stat().st_size if log.is_file() else 0
        ended = attempt([*argv, *more], output, log, case.size, kill)
        problem = problem or ended.problem
        if kill and ended.killed:
            killed.append(kill)
            during.append(ended.during)
            alone += [ended.alone] if ended.alone is not None else []
        elif any(ended.statuses) and not had_ended(output, ended, log, said):
            problem = problem or f"{' '.join(more) or 'the run'} ended with {ended.statuses}: {_tail(log)}"
            break
        if problem:
            break
    if problem is None:
        problem = "; ".join(differences(folder / f"{case.method}-{case.size}", output)) or None
    if problem is None:
        shutil.rmtree(output)
    else:
        places = f"killed {', then '.join(map(str, killed))}" if killed else "not killed"
        problem = f"{case.method} on {case.size}, {places} (plan {case.seed!r}): {problem}"
    return Outcome(killed, during, problem, alone)


def had_ended(output: Path, ended: Ended, log: Path, said: int) -> bool:
    """Whether --resume found a finished run, and says so in the log behind its first `said` bytes."""
    refused = b"nothing is left to resume" in log.read_bytes()[said:] and all(status == 2 for status in ended.statuses)
    return refused and (output / "summary.json").is_file()


def found(cases: list[Case], done: list[Outcome], launched: list[tuple[str, str | None]]) -> Found:
    """The table, by phase and number of processes; the runs by their launchers in rows of their own."""
    kinds = list(launched)
    for case, one in zip(cases, done, strict=True):
        on = "one process" if case.size == 1 else f"{case.size} ranks"
        for number, hit in enumerate(one.during):
            phase = hit.rpartition(": ")[2]
            phase = _KINDS.get(phase, phase) if number == 0 else "resume"
            kinds.append((f"{phase}, {on}", one.problem))
        if one.problem and not one.killed:
            kinds.append((f"before the kill, {on}", one.problem))
    alone = [seconds for one in done for seconds in one.alone]
    by_method = {
        name: sum(len(o.killed) for c, o in zip(cases, done, strict=True) if c.method == name) for name in METHODS
    }
    moved = sum(kill.phase != hit for one in done for kill, hit in zip(one.killed, one.during, strict=True))
    missed = sum(len(case.kills) - len(one.killed) for case, one in zip(cases, done, strict=True))
    return Found(
        by_kind(sorted(kinds, key=lambda kind: kind[0])),
        {
            "kills": len(launched) + sum(len(one.killed) for one in done),
            "kills by method": by_method,
            "the run had ended before the kill": missed,
            "the phase had ended before the kill, which counts where it hit": moved,
            "most seconds that ranks left over took to end without a signal": round(max(alone, default=0.0), 2),
        },
    )


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-1500:] if log.is_file() else ""
