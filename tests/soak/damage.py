"""One file of a run is damaged, then the run is resumed (a case of disk_trials.py).

A file is cut in half, emptied, removed, replaced by a folder, or has one bit changed. Of the newest checkpoint it must
be found and named before work starts, and the checkpoint before taken; with all checkpoints damaged, and in what else
the training reads, the run must stop, name the file, and touch nothing. Of what it only shows, it must be named. A
damage of which nothing is said has survived only if it is none of the newest checkpoint, and the run ends in what the
undisturbed one has, to the last bit.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.soak.tiny_runs import TRAIN, Ended, Home, difference, outcome

Way = Callable[[Path, random.Random], None]


def cut(path: Path, rng: random.Random) -> None:
    """Leave the first half."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path, rng: random.Random) -> None:
    """Leave nothing in it."""
    os.truncate(path, 0)


def remove(path: Path, rng: random.Random) -> None:
    """Leave nothing of it."""
    path.unlink()


def folder(path: Path, rng: random.Random) -> None:
    """Put a folder in its place."""
    path.unlink()
    path.mkdir()


def flip(path: Path, rng: random.Random) -> None:
    """Change one bit, somewhere."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def digit(path: Path, rng: random.Random) -> None:
    """Change the lowest bit of a digit, so that a text can be read as before; of any byte, where there is none."""
    data = bytearray(path.read_bytes())
    places = [i for i, byte in enumerate(data) if chr(byte).isdigit()] or range(len(data))
    data[rng.choice(places)] ^= 1
    path.write_bytes(data)


WAYS: dict[str, Way] = {
    "cut in half": cut, "emptied": empty, "removed": remove, "a folder in its place": folder,
    "a bit flipped": flip, "a digit changed": digit,
}  # fmt: skip
BITS = ("a bit flipped", "a digit changed")


@dataclass
class Damage:
    """What is done to a run that was cut off, and what is asked of the run that is resumed.

    Attributes:
        what: The file, for people: its place in the run.
        way: One of WAYS.
        files: These are damaged.
        seed: Of the places.
        stops: The run must stop, or be none the worse.
        newest: It is of the newest checkpoint alone, so that the run must say that it goes on from the one before.
        early: The run was cut off before its first checkpoint, which would know what it was made from.
    """

    what: str
    way: str
    files: list[str]
    seed: int = 0
    stops: bool = False
    early: bool = False
    newest: bool = False


class CutOff:
    """A run that a kill cut off behind its last checkpoint, before final/.

    Args:
        home: Has the model and the rows.
        case: One of TRAIN.
    """

    def __init__(self, home: Home, case: str) -> None:
        self.home, self.case, self.output = home, case, home.folder / "trial"
        self.kept = home.folder / "cut off"
        shutil.rmtree(self.output, ignore_errors=True)
        ended = self.run()
        if ended.status != 0:
            raise RuntimeError(f"the undisturbed run ended with {ended.status}:\n{ended.said}")
        self.want = outcome(self.output)
        for name in ("summary.json", "predictions.jsonl", "report.html"):
            (self.output / name).unlink()
        for name in ("final", "adapter"):
            shutil.rmtree(self.output / name, ignore_errors=True)
        shutil.rmtree(self.kept, ignore_errors=True)
        self.output.rename(self.kept)

    def run(self, *more: str) -> Ended:
        """The command."""
        return self.home.train(self.output, *TRAIN[self.case], *more)

    def files(self, below: str, pattern: str = "*") -> list[str]:
        """Files, relative to the run's folder."""
        found = sorted(p for p in (self.kept / below).rglob(pattern) if p.is_file())
        return [p.relative_to(self.kept).as_posix() for p in found]

    def _checkpoints(self) -> list[str]:
        return sorted(p.name for p in (self.kept / "checkpoints").iterdir())[-2:]

    def newest(self) -> list[Damage]:
        """To each file of the newest checkpoint."""
        found = []
        for file in self.files(f"checkpoints/{self._checkpoints()[-1]}"):
            for way, seed in [*((way, 0) for way in WAYS), (BITS[0], 1), (BITS[0], 2)]:
                found.append(Damage(f"newest checkpoint: {Path(file).name}", way, [file], seed, newest=True))
        return found

    def damages(self) -> list[Damage]:
        """To all checkpoints, and to the reference."""
        first, last = self._checkpoints()
        found = []
        for name in ("trainer_state.json", *(p.name for p in (self.kept / "checkpoints" / last).glob("*.safetensors"))):
            both = [f"checkpoints/{step}/{name}" for step in (first, last)]
            found += [Damage(f"every checkpoint: {name}", way, both, stops=True) for way in WAYS]
        for file in self.files("reference"):
            found += [Damage(file, way, [file], stops=True) for way in WAYS]
        return found

    def trial(self, damage: Damage) -> str | None:
        """Damage, resume; what is lost."""
        shutil.rmtree(self.output, ignore_errors=True)
        shutil.copytree(self.kept, self.output)
        if damage.early:
            shutil.rmtree(self.output / "checkpoints")
        for file in damage.files:
            WAYS[damage.way](self.output / file, random.Random(f"{file} {damage.seed}"))
        before = _listing(self.output)
        ended = self.run("--resume")
        problem = self._judged(damage, ended, before)
        said = f"{self.case}: {', '.join(damage.files)}, {damage.way}, seed {damage.seed}"
        return problem and f"{said}: {problem}"

    def _judged(self, damage: Damage, ended: Ended, before: Sequence[str]) -> str | None:
        if "Traceback" in ended.said or ended.status not in (0, 2):
            return f"status {ended.status}, {ended.said.strip()[-300:]}"
        file = Path(damage.files[0])
        # What else the checksums do not fit, and what reads a file under another name.
        name = {"checksums.json": file.parent.name, "handover.json": ".json"}.get(file.name, file.name)
        named = [line for line in ended.said.splitlines() if name in line and ("warning" in line or "error" in line)]
        if ended.status == 2:
            if not named:
                return f"stops, and does not name the file: {ended.said.strip()[-300:]}"
            if _listing(self.output) != before:
                return "stops, and has touched the run"
            return None if damage.stops else f"stops: {named}"
        other = difference(self.want, outcome(self.output))
        if damage.newest and (silent := _silent(ended.said, named)):
            return f"goes on, {silent}{', and ' + other if other else ''}"
        if other is None or (named and self._only_shown(damage)):
            return None
        return f"goes on{'' if named else ' without a word'}, and {other}"

    def _only_shown(self, damage: Damage) -> bool:
        """Whether what is damaged is for people alone, so that a run need not be like the undisturbed one."""
        return not damage.files[0].startswith(("checkpoints/", "reference/"))


def _silent(said: str, named: Sequence[str]) -> str | None:
    """What is wrong with the words of a run whose newest checkpoint is damaged; None for nothing."""
    told = [line for line in named if "going on from" in line]
    if not told:
        return "without saying that it goes on from an earlier checkpoint, and for which file"
    return None if said.index(told[0]) < said.find("\nloading ") else "and says so when it has begun"


def others(run: CutOff) -> list[Damage]:
    """Damage to what else a resumed run reads."""
    names = ["metrics.jsonl", "rollouts.jsonl", "config.yaml", "trackers.json", "rejected.jsonl", *run.files("eval")]
    found = []
    for name in (name for name in names if (run.kept / name).is_file() and (run.kept / name).stat().st_size):
        found += [Damage(name, way, [name], stops=True) for way in WAYS]
        found += [Damage(name, way, [name], seed, stops=True) for way in BITS for seed in (1, 2, 3)]
    return found


def handed_over(run: CutOff) -> list[Damage]:
    """Damage to what the second stage of TRACT reads of the first."""
    names = ("self_generated.jsonl", "held_out.jsonl", "handover.json", "stage1/final/real_fast.json")
    return [
        Damage(name, way, [name], stops=True, early=early) for early in (True, False) for name in names for way in WAYS
    ]


def _listing(output: Path) -> list[str]:
    """Names and sizes of all that lies there."""
    return sorted(f"{p} {p.stat().st_size if p.is_file() else ''}" for p in output.rglob("*"))


def trials(home: Home, case: str, share: float, newest: bool) -> Iterator[tuple[str, str | None]]:
    """Try what there is to damage in a run of a case, or a share of it; gives kinds, and what was lost.

    Args:
        home: Has the model and the rows.
        case: One of TRAIN.
        share: Of what there is.
        newest: In its newest checkpoint; without, in all else.
    """
    run = CutOff(home, case)
    if newest:
        todo = run.newest()
    else:
        todo = handed_over(run) if case == "tract" else [*run.damages(), *(others(run) if case == "real" else [])]
    count = max(1, round(len(todo) * share))
    for damage in (todo[i * len(todo) // count] for i in range(count)):
        where = damage.what.partition(":")[0].partition("/")[0]
        yield f"{case}, {where}: {damage.way}", run.trial(damage)
