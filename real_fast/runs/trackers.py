"""What a run logs, in TensorBoard, Trackio or Weights & Biases too; ``report_to`` says where.

Names are those of Transformers and TRL, so that their curves and these lie over each other: ``train/reward``,
``train/completions/mean_length``, ``eval/pearson`` (one curve over all evaluations); the warm-up's stand apart under
``warmup/``, since its loss is another one. The step counts all updates, those of the warm-up first.

metrics.jsonl is what counts. trackers.json, beside it, knows the run's id and how far each tracker has come: a resumed
run goes on in the same curve, logs no step twice, and brings up to date a tracker that failed or was not there before.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import yaml

from real_fast.config import Config
from real_fast.errors import ConfigError
from real_fast.runs.folder import RunFolder
from real_fast.utils.jsonio import clean, encode, parse, write_json

logger = logging.getLogger(__name__)

# With a name that each must have: a folder called wandb in the working directory can be imported too.
_PACKAGES = {"tensorboard": ("torch.utils.tensorboard", "SummaryWriter"), "trackio": ("trackio", "init")}
_PACKAGES |= {"wandb": ("wandb", "init")}


@dataclass
class TrackedRun:
    """What a tracker needs to know of a run.

    Attributes:
        name: For people.
        id: The same after a resume, another one in every other folder.
        config: The settings.
        folder: Folder of the run.
        purge: Steps from here on are made again by this resumed run; None where the tracker has nothing yet.
    """

    name: str
    id: str
    config: dict[str, Any]
    folder: Path
    purge: int | None


class Tracker(Protocol):
    """A place for curves."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Add values; a step may come again, with other names."""

    def finish(self, status: int) -> None:
        """Send what has not been sent; `status` is the run's exit status."""


class TensorBoard:
    """Event files in OUTPUT/tensorboard."""

    def __init__(self, run: TrackedRun) -> None:
        self.run = run
        self.writer: Any = None

    def log(self, values: dict[str, float], step: int) -> None:
        """Write and flush, so that a killed run loses nothing."""
        if self.writer is None:  # not before: until the first value, the folder may still hold an earlier run
            writer = package("tensorboard").SummaryWriter
            self.writer = writer(str(self.run.folder / "tensorboard"), purge_step=self.run.purge)
            settings = yaml.safe_dump(self.run.config, sort_keys=False, allow_unicode=True)
            self.writer.add_text("config", f"```yaml\n{settings}```", step)
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self, status: int) -> None:
        """Close the file."""
        if self.writer is not None:
            self.writer.close()


class Trackio:
    """A run in the project TRACKIO_PROJECT, "real-fast" without it; TRACKIO_SPACE_ID and the like are Trackio's own."""

    def __init__(self, run: TrackedRun) -> None:
        self.trackio = package("trackio")
        project = os.environ.get("TRACKIO_PROJECT") or "real-fast"
        # Trackio resumes by name.
        self.trackio.init(project=project, name=f"{run.name}-{run.id}", config=run.config, resume="allow")

    def log(self, values: dict[str, float], step: int) -> None:
        """Hand over to Trackio's thread."""
        self.trackio.log(values, step=step)

    def finish(self, status: int) -> None:
        """Wait for Trackio's thread."""
        self.trackio.finish()


class Wandb:
    """A run in the project WANDB_PROJECT, "real-fast" without it; WANDB_MODE and the like are Weights & Biases' own."""

    def __init__(self, run: TrackedRun) -> None:
        project = os.environ.get("WANDB_PROJECT") or "real-fast"
        self.run = package("wandb").init(project=project, name=run.name, id=run.id, resume="allow")
        self.run.config.update(run.config, allow_val_change=True)  # a run may be resumed with other settings
        # An axis of our own, as Transformers has it: of W&B's steps, one that is not new would be dropped.
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def log(self, values: dict[str, float], step: int) -> None:
        """Hand over to W&B's process."""
        self.run.log({**values, "train/global_step": step})

    def finish(self, status: int) -> None:
        """Upload the rest."""
        self.run.finish(exit_code=status)


_TRACKERS: dict[str, Callable[[TrackedRun], Tracker]]
_TRACKERS = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}


class Trackers:
    """The trackers of one run; as a context, they are finished however it ends.

    Args:
        config: Settings: report_to, run_name, warmup.steps.
        folder: The run's folder, not claimed yet: nothing is written there before the first value.
        step: The update that a resumed run goes on after; None for a run from the start.

    Raises:
        ConfigError: A tracker does not start.
    """

    def __init__(self, config: Config, folder: RunFolder, step: int | None) -> None:
        self.warmup = config.warmup.steps
        self.complete = False
        self._file = folder.path / "trackers.json"
        known = _known(self._file) if folder.resumed else {}
        self._id: str = known.get("id") or secrets.token_hex(4)
        # By tracker and kind of record, the last step that it has.
        self._sent: dict[str, dict[str, int]] = known.get("sent", {})
        name = config.run_name or folder.path.resolve().name
        again = 0 if step is None else self.warmup + step + 1
        if "tensorboard" in self._sent and "tensorboard" in names(config):  # its steps alone can be taken back
            self._sent["tensorboard"] = {k: min(n, again - 1) for k, n in self._sent["tensorboard"].items()}
        self._active: dict[str, Tracker] = {}
        for tracker in names(config):
            run = TrackedRun(name, self._id, asdict(config), folder.path, again if tracker in self._sent else None)
            try:
                self._active[tracker] = _TRACKERS[tracker](run)
            except Exception as error:  # each tracker has its own kinds
                self._finish(1)
                offline = ", set WANDB_MODE=offline" if tracker == "wandb" else ""
                raise ConfigError(
                    f"report_to: {tracker} does not start ({_said(error)}): see to that{offline}, or leave it out"
                ) from error

    def catch_up(self, records: Iterable[dict[str, Any]]) -> None:
        """Log what earlier parts of the run have logged and a tracker does not have."""
        for record in records:
            self.log(record)

    def log(self, record: dict[str, Any]) -> None:
        """Log a record of metrics.jsonl. A tracker that fails is left out from there on; the run goes on."""
        if not self._active:
            return
        kind, step = place(record, self.warmup)
        values = numbers(clean(record["eval"] if kind == "eval" else record), kind)
        values.pop(f"{kind}/step", None)
        for name, tracker in list(self._active.items()):
            sent = self._sent.setdefault(name, {})
            if step <= sent.get(kind, -1):
                continue
            try:
                tracker.log(values, step)
            except Exception as error:  # each tracker has its own kinds, and none is worth the run
                del self._active[name]
                logger.warning(
                    "%s failed (%s) and is left out from step %d on; %s has all of it, and a --resume logs what is "
                    "missing",
                    name,
                    _said(error),
                    step,
                    self._file.with_name("metrics.jsonl"),
                )
            else:
                sent[kind] = step
        state = {"id": self._id, "folder": str(self._file.parent.resolve()), "sent": self._sent}
        write_json(self._file, {**state, "sha256": _digest(state)})

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish(1 if kind else 0 if self.complete else 130)

    def _finish(self, status: int) -> None:
        for name, tracker in self._active.items():
            try:
                tracker.finish(status)
            except (Exception, KeyboardInterrupt) as failure:  # Ctrl-C: somebody does not want to wait for an upload
                logger.warning("%s was not finished (%s); metrics.jsonl has all of it", name, _said(failure))


def _known(file: Path) -> dict[str, Any]:
    """What trackers.json says; nothing, and so new curves, where it is damaged or was copied with its run."""
    here = file.parent.resolve()
    try:
        known = _read(file)
        first = Path(known.get("folder") or here)
        if first != here and _read(first / file.name).get("id") == known.get("id"):
            logger.warning("%s is a copy of %s: the trackers start new curves", here, first)
            return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged (%s): the trackers start new curves", file, error)
        return {}
    return known


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    known = parse(file.read_text(encoding="utf-8"))
    if (want := known.pop("sha256", None)) and want != _digest(known):
        raise ValueError("it is not as it was written")
    sent = {tracker: {kind: int(step) for kind, step in of.items()} for tracker, of in known["sent"].items()}
    return {"id": str(known["id"]), "folder": known.get("folder"), "sent": sent}


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(encode(state)).hexdigest()


def names(config: Config) -> list[str]:
    """The trackers that a config asks for, each once."""
    asked = [config.report_to] if isinstance(config.report_to, str) else config.report_to
    return list(dict.fromkeys(asked))


def check_installed(config: Config) -> None:
    """Import what `report_to` asks for, before anything slow starts. Raises :class:`ConfigError` as :func:`package`."""
    for tracker in names(config):
        package(tracker)


def package(tracker: str) -> Any:
    """The package of a tracker.

    Raises:
        ConfigError: It cannot be imported.
    """
    name, attribute = _PACKAGES[tracker]
    try:
        module = importlib.import_module(name)
        getattr(module, attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"report_to asks for {tracker}, which cannot be imported ({error}): pip install 'real-fast[{tracker}]', "
            f"or leave {tracker} out of report_to"
        ) from error
    return module


def place(record: dict[str, Any], warmup: int) -> tuple[str, int]:
    """Kind of a record (warmup, train or eval) and its step, counted over the warm-up and what follows."""
    if record["phase"] == "warmup":
        return "warmup", record["step"]
    kind = "eval" if record["phase"] == "eval" else "train"
    return kind, record["step"] + (0 if record.get("name") == "before" else warmup)


def numbers(value: Any, name: str) -> dict[str, float]:
    """Every number in a value as NAME/KEY/...; an interval's two ends are low and high. The rest is left out."""
    if isinstance(value, list) and len(value) == 2:
        value = {"low": value[0], "high": value[1]}
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in numbers(part, f"{name}/{key}").items()}
    return {name: value + 0} if isinstance(value, int | float) else {}  # + 0: True is 1


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
