"""A run's folder: who may write there, its metrics and evaluations."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from real_fast.config import Config, cli
from real_fast.errors import CheckpointError, OutputError, remedy
from real_fast.runs import checkpoint, fingerprints
from real_fast.runs.lock import move_lock
from real_fast.utils.files import free_name, replacing
from real_fast.utils.jsonio import append_jsonl, clean, encode, parse, read_jsonl, write_json, write_jsonl

logger = logging.getLogger(__name__)
# Any of these is a run's. config.yaml alone would not do: it can be lost.
_OF_A_RUN = ("config.yaml", "metrics.jsonl", "checkpoints")
_DIGEST = "sha256"  # the key of an evaluation's own, in its summary
_RESULTS = ("predictions.jsonl", "report.html", "final", "summary.json")
_FOLDERS = ("final", "adapter", "reference")  # written whole, see real_fast.runs.sealed


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an OSError (read-only, disk full, ...) into an :class:`OutputError` that names the folder."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"output {folder} cannot be written: {remedy(error)}") from error


def check_writable(folder: Path) -> None:
    """Make the folder and try to write to it, before anything slow starts. Raises :class:`OutputError`."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}.tmp"  # if it stays, whoever claims the folder removes it
        try:
            probe.write_bytes(b"0")
        except OSError:
            with suppress(OSError):  # the error that came first says what is wrong
                probe.unlink(missing_ok=True)
            raise
    try:
        probe.unlink(missing_ok=True)
    except OSError as error:  # such a disk would not let a file be replaced either
        said = remedy(error)
        raise OutputError(f"output {folder} cannot be written: {probe.name} cannot be removed again: {said}") from error


def remove_left_over(*folders: Path) -> None:
    """Remove what a kill in the middle of a file has left of it under its temporary name."""
    for folder in folders:
        for left in folder.glob(".*.tmp"):
            left.unlink(missing_ok=True)


class RunFolder:
    """The folder of one run.

    Args:
        config: Settings; ``output``, ``resume`` and ``overwrite`` decide what happens to an earlier run there.

    Raises:
        OutputError: The folder cannot be written, or holds a run that was not to be touched.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(config.output).expanduser()
        self.finished = (self.path / "summary.json").is_file()
        self._started = self.finished or any((self.path / name).exists() for name in _OF_A_RUN)
        if self._started and not config.overwrite and not config.resume:
            what = "a finished run" if self.finished else "an unfinished run (go on with --resume)"
            raise OutputError(
                f"output {self.path} holds {what}: take another --output, or --overwrite to move it aside"
            )
        if self._started and config.overwrite and Path.cwd().is_relative_to(self.path.resolve()):
            raise OutputError(
                f"output {self.path} holds the working folder, so it cannot be moved aside: start elsewhere"
            )
        check_writable(self.path)
        self.resumed = self._started and not config.overwrite
        if self.resumed:
            for path in (*self.path.glob("*.json*"), self.path / "config.yaml", *self.path.glob("eval/*.json*")):
                if path.is_dir():
                    raise OutputError(f"{path} is a folder, where the run has a file: move it away, and --resume")
            for name in ("metrics.jsonl", "rollouts.jsonl"):
                self.lines(name)  # what is broken there is found before the model is loaded

    def check_extends(self, steps: int, done: int | None) -> None:
        """A finished run goes on only where more updates are asked for than it has.

        Args:
            steps: Updates that are asked for.
            done: Updates of the newest checkpoint; None where there is none.

        Raises:
            OutputError: There is nothing left to do, or nothing to go on from.
        """
        if not self.resumed:
            return
        if self.finished and done is None:
            raise OutputError(
                f"output {self.path} holds a finished run without its checkpoints, so it cannot be resumed: start "
                f"another run from its weights with --init_from {self.path} and another --output"
            )
        if done is not None and (steps < done or (self.finished and steps == done)):
            what = f"finished run of {done} updates" if self.finished else f"run that has made {done} updates"
            raise OutputError(
                f"output {self.path} holds a {what}, and train.steps is {steps}: nothing is left to resume; raise "
                "train.steps to extend it, or take another --output"
            )

    def claim(self, config: Config) -> None:
        """Start to write here; until then, nothing of an earlier run has been touched."""
        if self._started and not self.resumed:
            move_aside(self.path)
        self.path.resolve().mkdir(parents=True, exist_ok=True)
        if self.finished and self.resumed:
            self._set_results_aside()
        remove_left_over(self.path, self.path / "eval", self.path / "profile")
        for name in _FOLDERS:
            for left in (f"{name}.tmp", f"{name}.replaced.tmp"):
                shutil.rmtree(self.path / left, ignore_errors=True)
        cli.dump(config, self.path / "config.yaml")

    def _set_results_aside(self) -> None:
        """A finished run is extended: its results are kept in superseded/, and made again at the end."""
        try:
            steps = int(parse((self.path / "summary.json").read_text(encoding="utf-8"))["steps"])
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{self.path / 'summary.json'} is damaged ({error}): remove it, and the run counts as unfinished"
            ) from error
        target = free_name(self.path / "superseded" / f"{steps}-steps")
        target.mkdir(parents=True)
        with replacing(target / "config.yaml") as temporary:
            shutil.copyfile(self.path / "config.yaml", temporary)
        # The summary last: it marks the run as finished.
        for path in (*self.path.glob("*.png"), *(self.path / name for name in _RESULTS)):
            if path.exists():
                os.replace(path, target / path.name)
        logger.info("the results after %s updates are kept in %s", steps, target)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def check_space(
        self, parameters: int, keep: int, reference: bool, resume_from: Path | None, merged: int = 0
    ) -> None:
        """Refuse to start where the checkpoints will not fit (weights and two moments in float32 each).

        Args:
            parameters: That are trained.
            keep: Checkpoints to keep.
            reference: Whether a copy of them as they start comes beside them.
            resume_from: The checkpoint that the run goes on from. It and those before it make room for later ones;
                what is damaged, or of a run that is moved aside, does not.
            merged: Parameters of the whole model, where adapters are trained and it is written too.

        Raises:
            OutputError: Too little free space.
        """
        rotated = checkpoint.complete(self.checkpoints)
        replaced = rotated[: rotated.index(resume_from) + 1] if resume_from else []
        written = sum(f.stat().st_size for path in replaced for f in path.rglob("*") if f.is_file())
        need = parameters * 4 * 3 * (keep + 1) + parameters * 4 * (1 + reference) + merged * 4 - written
        free = shutil.disk_usage(self.path).free
        if free < need:
            raise OutputError(
                f"output {self.path} has {free / 2**30:.1f} GiB free, and the checkpoints need {need / 2**30:.1f} GiB: "
                "free space, lower save.keep, or take another --output"
            )

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; numbers that are not finite become null."""
        self.append("metrics.jsonl", record)

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Append one line to a file of the run."""
        append_jsonl(self.path / name, clean(record))

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return self.lines("metrics.jsonl")

    def lines(self, name: str) -> list[dict[str, Any]]:
        """All lines of a JSON Lines file of the run; none where it is not there.

        Raises:
            OutputError: A line that is not the run's.
        """
        file = self.path / name
        try:
            found = read_jsonl(file) if file.is_file() else []
        except ValueError as error:
            raise OutputError(f"{error}: mend that line, or remove it") from error
        for line in found:
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise OutputError(f"{file} has a line without a step: {str(line)[:80]!r}: mend that line, or remove it")
        return found

    def rewind(self, step: int) -> None:
        """Set aside metric lines and evaluations after `step`, which a resumed run makes again (-1: all of them)."""

        def metric_stays(m: dict[str, Any]) -> bool:
            before = m.get("phase") == "warmup" or (m["step"] <= step and m.get("name") != "after")
            return step >= 0 and before

        self._keep("metrics", metric_stays)
        if (self.path / "rollouts.jsonl").is_file():
            self._keep("rollouts", lambda r: r["step"] <= step)
        for file in sorted((self.path / "eval").glob("*.json*")):
            name = file.name.partition(".")[0]
            number = name.removeprefix("step-")
            made_at = int(number) if number.isdecimal() else 0
            if step < made_at or step < 0 or name == "after":
                (self.path / "eval" / "superseded").mkdir(exist_ok=True)
                os.replace(file, free_name(self.path / "eval" / "superseded" / file.name))

    def _keep(self, name: str, stays: Callable[[dict[str, Any]], bool]) -> None:
        """Leave the lines that stay in a file, and move the others to the one beside it."""
        kept: list[dict[str, Any]] = []
        moved: list[dict[str, Any]] = []
        for line in self.lines(f"{name}.jsonl"):
            (kept if stays(line) else moved).append(line)
        if moved:
            aside = f"{name}.superseded.jsonl"
            write_jsonl(self.path / aside, [*self.lines(aside), *moved])
        write_jsonl(self.path / f"{name}.jsonl", kept)  # also rids the file of a last line that was cut off

    def evaluation(self, name: str) -> dict[str, Any] | None:
        """Summary of an evaluation that has been made; None, with a warning, where one of its files is damaged."""
        file = self.path / "eval" / f"{name}.json"
        if not file.is_file():
            return None
        try:
            summary: dict[str, Any] = parse(file.read_text(encoding="utf-8"))
            if (want := summary.pop(_DIGEST, None)) and want != self._digest(name, summary):
                raise ValueError(f"it or {name}.predictions.jsonl is not as it was written")
            count = len(self.predictions(name))
            if count != summary["n"]:
                raise ValueError(f"{count} predictions of {summary['n']}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("the evaluation %s is damaged, and left out: %s", file, error)
            return None
        return summary

    def predictions(self, name: str) -> list[dict[str, Any]]:
        """Predictions of an evaluation."""
        return list(read_jsonl(self.path / "eval" / f"{name}.predictions.jsonl"))

    def save_evaluation(self, name: str, summary: dict[str, Any], predictions: list[dict[str, Any]]) -> None:
        """Write an evaluation; the summary comes last and marks it complete."""
        (self.path / "eval").mkdir(exist_ok=True)
        write_jsonl(self.path / "eval" / f"{name}.predictions.jsonl", predictions)
        write_json(self.path / "eval" / f"{name}.json", {**summary, _DIGEST: self._digest(name, summary)})

    def _digest(self, name: str, summary: dict[str, Any]) -> str:
        """SHA-256 of an evaluation, of which either file may be damaged: its summary's values and its predictions."""
        predictions = (self.path / "eval" / f"{name}.predictions.jsonl").read_bytes()
        return hashlib.sha256(encode(summary) + predictions).hexdigest()


def move_aside(folder: Path) -> None:
    """Rename a folder to the first free NAME.old-1, NAME.old-2, ...; its lock stays with its name."""
    folder, n = folder.resolve(), 1  # a link stays: the new run belongs on the disk that it leads to
    while (old := folder.with_name(f"{folder.name}.old-{n}")).exists():
        n += 1
    os.replace(folder, old)
    move_lock(old, folder)
    logger.info("moved the earlier run to %s", old)


def settings_in(folder: Path) -> dict[str, Any]:
    """The settings of the run in a folder, by their full names ("train.steps"), as far as they can be read."""
    for path in reversed(checkpoint.complete(folder / "checkpoints")):
        with suppress(CheckpointError):
            if known := fingerprints.read(path):
                return known.settings
    try:
        found = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return _flat(found) if isinstance(found, dict) else {}


def _flat(settings: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
