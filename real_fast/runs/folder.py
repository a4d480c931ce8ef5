"""A run's folder: who may write there, its metrics and evaluations."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from real_fast.config import Config, cli
from real_fast.errors import OutputError
from real_fast.utils.jsonio import append_jsonl, clean, read_jsonl, write_json, write_jsonl

logger = logging.getLogger(__name__)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an OSError (read-only, disk full, ...) into an :class:`OutputError` that names the folder."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"output {folder} cannot be written: {error.strerror or error}") from error


def check_writable(folder: Path) -> None:
    """Make the folder and try to write to it, before anything slow starts. Raises :class:`OutputError`."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(b"0")


class RunFolder:
    """The folder of one run.

    Args:
        config: Settings; ``output``, ``resume`` and ``overwrite`` decide what happens to an earlier run there.

    Raises:
        OutputError: The folder cannot be written, or holds a run that was not to be touched.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(config.output).expanduser()
        finished = (self.path / "summary.json").is_file()
        started = self._started = finished or (self.path / "config.yaml").is_file()
        if finished and config.resume and not config.overwrite:
            raise OutputError(
                f"output {self.path} holds a finished run: nothing is left to resume; take another --output"
            )
        if started and not config.overwrite and not config.resume:
            what = "a finished run" if finished else "an unfinished run (go on with --resume)"
            raise OutputError(
                f"output {self.path} holds {what}: take another --output, or --overwrite to move it aside"
            )
        check_writable(self.path)
        self.resumed = started and not config.overwrite

    def claim(self, config: Config) -> None:
        """Start to write here; until then, nothing of an earlier run has been touched."""
        if self.resumed:
            self._report_changes(config)
        elif self._started:
            move_aside(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        cli.dump(config, self.path / "config.yaml")

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def check_space(self, parameters: int, keep: int, reference: bool = False) -> None:
        """Refuse to start where the checkpoints will not fit (weights and two moments in float32 each).

        Args:
            parameters: Of the model.
            keep: Checkpoints to keep.
            reference: Whether a copy of the start weights comes beside them.

        Raises:
            OutputError: Too little free space.
        """
        written = sum(f.stat().st_size for f in self.checkpoints.rglob("*") if f.is_file())
        need = parameters * 4 * 3 * (keep + 1) + parameters * 4 * (1 + reference) - written
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
        """All lines of a JSON Lines file of the run; none where it is not there."""
        file = self.path / name
        return list(read_jsonl(file)) if file.is_file() else []

    def rewind(self, step: int) -> None:
        """Set aside metric lines and evaluations after `step`, which a resumed run makes again (-1: all of them)."""

        def metric_stays(m: dict[str, Any]) -> bool:
            before = m["phase"] == "warmup" or (m["step"] <= step and m.get("name") != "after")
            return step >= 0 and before

        self._keep("metrics", metric_stays)
        if (self.path / "rollouts.jsonl").is_file():
            self._keep("rollouts", lambda r: r["step"] <= step)
        for file in (self.path / "eval").glob("*.json*"):
            name = file.name.partition(".")[0]
            made_at = int(name.removeprefix("step-")) if name.startswith("step-") else 0
            if step < made_at or step < 0 or name == "after":
                (self.path / "eval" / "superseded").mkdir(exist_ok=True)
                os.replace(file, self.path / "eval" / "superseded" / file.name)

    def _keep(self, name: str, stays: Callable[[dict[str, Any]], bool]) -> None:
        """Leave the lines that stay in a file, and move the others to the one beside it."""
        kept = []
        for line in self.lines(f"{name}.jsonl"):
            if stays(line):
                kept.append(line)
            else:
                self.append(f"{name}.superseded.jsonl", line)
        write_jsonl(self.path / f"{name}.jsonl", kept)  # also rids the file of a last line that was cut off

    def evaluation(self, name: str) -> dict[str, Any] | None:
        """Summary of an evaluation that an interrupted run has already made."""
        file = self.path / "eval" / f"{name}.json"
        summary: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        return summary

    def predictions(self, name: str) -> list[dict[str, Any]]:
        """Predictions of an evaluation."""
        return list(read_jsonl(self.path / "eval" / f"{name}.predictions.jsonl"))

    def save_evaluation(self, name: str, summary: dict[str, Any], predictions: list[dict[str, Any]]) -> None:
        """Write an evaluation; the summary comes last and marks it complete."""
        (self.path / "eval").mkdir(exist_ok=True)
        write_jsonl(self.path / "eval" / f"{name}.predictions.jsonl", predictions)
        write_json(self.path / "eval" / f"{name}.json", summary)

    def _report_changes(self, config: Config) -> None:
        old = settings_in(self.path)
        new = _flat(asdict(config))
        for key in sorted(old.keys() & new.keys() - {"output", "overwrite", "resume"}):
            if old[key] != new[key]:
                logger.warning("resuming with %s = %r, which was %r", key, new[key], old[key])


def move_aside(folder: Path) -> None:
    """Rename a folder to the first free NAME.old-1, NAME.old-2, ..."""
    n = 1
    while (old := folder.with_name(f"{folder.name}.old-{n}")).exists():
        n += 1
    os.replace(folder, old)
    logger.info("moved the earlier run to %s", old)


def settings_in(folder: Path) -> dict[str, Any]:
    """The settings of the run in a folder, by their full names ("train.steps"); none where there is no run."""
    file = folder / "config.yaml"
    return _flat(yaml.safe_load(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
