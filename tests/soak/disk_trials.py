"""One operation on the disk fails, in one run after another: python -m tests.soak.disk_trials FOLDER '{"CASE": SHARE}'.

Runs in a process whose disk can fail (faulty_disk.py), so that what takes seconds to import is imported once. A trial
is a command in which an operation fails, and then what a user does next: ``--resume``, or the command again. It counts
as survived if

- the command ends with status 2 and one line that names a file or folder of the output and says what to do, without a
  traceback; or it goes on, with a warning that does, and its results are those of the undisturbed one;
- every checkpoint that is there is whole, and the newest is no older than the last one that had its name before;
- the command after it ends with status 0 and in what the undisturbed one has, to the last bit, and leaves no
  half-written file behind.

Writes a JSON line for each trial to FOLDER/outcomes.jsonl: the kind of fault, and what was lost or null.
"""

from __future__ import annotations

import faulthandler
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from real_fast.runs import checkpoint, sealed
from real_fast.utils.jsonio import append_jsonl
from tests.soak import damage
from tests.soak.faulty_disk import FAULTS, Disk, DiskFault
from tests.soak.tiny_runs import TRAIN, Ended, Home, difference, outcome, prepare

COMMANDS = ("evaluate", "judge", "compare")
CASES = (*TRAIN, *COMMANDS)
DAMAGE, NEWEST, WRITES = "damage of ", "newest checkpoint of ", "writes of "
OUTCOMES = "outcomes.jsonl"
_HUNG = 180  # seconds, on a machine that does other things too
# What there is to do: none of these words is an errno's.
_REMEDY = re.compile(r"free (some )?space|writable|another --output|quota raised|look at the disk|remove it|--resume")
_CHECKPOINT = re.compile(r"checkpoints/step-(\d{6})$")
Trial = tuple[int, str]  # number of the operation, name of the fault


def plan(journal: Sequence[tuple[str, Path]], share: float, start: int = 0) -> list[Trial]:
    """Which operations fail how. A share of 1 is each operation from `start` on in one way, 2 is each in two."""
    count, tried = Counter[str](), []
    for number, (name, _) in enumerate(journal[start:], start):
        ways = [fault for fault in FAULTS if name in FAULTS[fault].ops]
        first = count[name]  # neighbours of a kind fail in different ways
        count[name] += 1
        tried.append([(number, ways[(first + i) % len(ways)]) for i in range(len(ways))])
    wanted = max(1, round(len(tried) * share))
    if share < 1:
        return [tried[i * len(tried) // wanted][0] for i in range(wanted)]
    return [ways[i] for i in range(len(FAULTS)) for ways in tried if i < len(ways)][:wanted]


def of_writes(journal: Sequence[tuple[str, Path]], share: float) -> list[Trial]:
    """Each write with the disk full, and with it read-only; or a share of them."""
    every = [(n, way) for n, (name, _) in enumerate(journal) if name == "write" for way in ("full", "readonly")]
    wanted = max(1, round(len(every) * share))
    return [every[i * len(every) // wanted] for i in range(wanted)]


class Sweep:
    """The trials of one command.

    Args:
        home: Has the model, the rows and, in ``whole``, a run for ``compare``.
        case: One of CASES.
    """

    def __init__(self, home: Home, case: str) -> None:
        self.case, self.output = case, home.folder / "trial"
        if case in TRAIN:
            self.first = lambda: home.train(self.output, *TRAIN[case])
            self.again = lambda: home.train(self.output, *TRAIN[case], "--resume")
        else:
            command: Callable[..., Ended] = getattr(home, case)
            more = () if case == "judge" else ("--overwrite",)
            self.first, self.again = lambda: command(self.output), lambda: command(self.output, *more)
        self.disk = Disk(home.folder / "trial")
        shutil.rmtree(self.output, ignore_errors=True)
        with self.disk.watched():
            ended = self.first()
        if ended.status != 0:
            raise RuntimeError(f"the undisturbed run ended with {ended.status}:\n{ended.said}")
        self.want, self.journal = self._results(), self.disk.journal
        self.start = 2 if case == "judge" else 0  # the shell makes the folder and the file

    def trials(self, tried: Sequence[Trial]) -> Iterator[tuple[str, str | None]]:
        """Try them; gives kinds, and what was lost. One in which nothing was left to fail is none."""
        failed = 0
        for number, way in tried:
            kind, problem = self.trial(number, FAULTS[way])
            failed += self.disk.fired_at >= 0
            if problem or self.disk.fired_at >= 0:
                yield kind, problem
        if not failed:
            yield f"{self.case}: no operation was left to fail", f"{self.case}: of {len(tried)} trials none was one"

    def trial(self, number: int, fault: DiskFault) -> tuple[str, str | None]:
        """One of them."""
        shutil.rmtree(self.output)
        with self.disk.watched(number, fault):
            ended = self.first()
        at = self.disk.fired_at
        name, path = self.disk.journal[at] if at >= 0 else ("nothing", self.output)
        went_on = " (the command goes on)" if ended.status == 0 else ""
        kind = f"{self.case}: {fault.what}{went_on}"
        if at < 0:
            return f"{self.case}: no operation was left to fail", self._afterwards(ended)
        where = f"operation {at} ({name} {path.relative_to(self.output)}), {fault.what}"
        problem = self._said(ended) or self._kept(at) or self._afterwards(ended)
        return kind, problem and f"{self.case}: {where}: {problem}"

    def _said(self, ended: Ended) -> str | None:
        """What is wrong with the words."""
        if "Traceback" in ended.said:
            return f"a traceback: {ended.said.strip().splitlines()[-1][:300]}"
        if ended.status not in (0, 2):
            return f"ended with status {ended.status}"
        mark = "error: " if ended.status else "warning: "
        lines = [line for line in ended.said.splitlines() if mark in line]
        if ended.status and len(last := [line for line in lines if line.startswith("real-fast ")]) != 1:
            return f"{len(last)} lines of errors: {lines}"  # what is written in the background has one in the log
        place = "standard output" if self.case == "judge" else str(self.output)
        clear = [line for line in lines if place in line and _REMEDY.search(line)]
        if not clear or (ended.status and clear != lines):
            return f"says no place, or not what to do: {lines}"
        return None

    def _kept(self, at: int) -> str | None:
        """What is wrong with the checkpoints."""
        before: dict[Path, int] = {}
        for name, path in self.disk.journal[:at]:
            if name == "rename" and (found := _CHECKPOINT.search(str(path))):
                before[path.parent] = int(found[1])
        for folder in self.output.rglob("checkpoints"):
            found = checkpoint.complete(folder)
            for path in found:
                if wrong := sealed.damage(path):
                    return f"{path.name} passes for whole: {wrong}"
            if folder in before and (not found or checkpoint.step_of(found[-1]) < before[folder]):
                return f"{folder} had step {before[folder]}, and has {[p.name for p in found]}"
        return None

    def _afterwards(self, ended: Ended) -> str | None:
        """What is lost after the disk is mended."""
        finished = self.case in TRAIN and (self.output / "summary.json").is_file()
        if ended.status != 0 and not finished:
            ended = self.again()
            if ended.status != 0 or "Traceback" in ended.said:
                return f"afterwards ended with {ended.status}: {ended.said.strip()[-600:]}"
            if self.case in TRAIN and (left := [p for p in self.output.rglob("*") if p.suffix in (".tmp", ".part")]):
                return f"{left} is left behind"
        return difference(self.want, self._results())

    def _results(self) -> dict[str, Any]:
        if self.case in TRAIN:
            return outcome(self.output)
        texts = {}
        for path in sorted(p for p in self.output.iterdir() if not p.name.startswith(".")):
            if path.suffix in (".jsonl", ".csv", ".md"):
                texts[path.name] = path.read_text(encoding="utf-8")
            else:
                texts[path.name] = ""
        return texts


def trials_of(home: Home, what: str, share: float) -> Iterator[tuple[str, str | None]]:
    """Try a share of a case, "writes of CASE", or "damage of CASE" or "newest checkpoint of CASE", of damage.py."""
    for prefix in (DAMAGE, NEWEST):
        if what.startswith(prefix):
            return damage.trials(home, what.removeprefix(prefix), share, prefix == NEWEST)
    sweep = Sweep(home, what.removeprefix(WRITES))
    if what.startswith(WRITES):
        return sweep.trials(of_writes(sweep.journal, share))
    return sweep.trials(plan(sweep.journal, share, sweep.start))


def main(folder: Path, shares: dict[str, float]) -> None:
    """Try the cases."""
    home = prepare(folder)
    for case, share in shares.items():
        faulthandler.dump_traceback_later(_HUNG, exit=True)
        for kind, problem in trials_of(home, case, share):
            append_jsonl(folder / OUTCOMES, [kind, problem])
            faulthandler.dump_traceback_later(_HUNG, exit=True)
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
