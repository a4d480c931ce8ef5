"""Runs of a second on a tiny model, called in this process as a user calls them, and what is left of them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_fast.runs import trackers
from real_fast.runs.checkpoint import complete
from real_fast.utils.jsonio import read_jsonl, write_jsonl
from tests.golden.trajectories import make_model
from tests.helpers import metric_lines

_SETTINGS = """
data: {train: TRAIN, eval: EVAL}
prompt: {template: short, system: Grade.}
rollout: {engine: transformers, prompts_per_step: 2, group_size: 2, max_tokens: 6, log_every: 1, log_prompts: 1}
supervised: {prompts_per_step: 2, feedbacks_per_prompt: 1}
warmup: {steps: 1, batch_size: 2}
optim: {lr: 3.0e-4}
objective: {kl_coef: 0.1}
train: {steps: 2, precision: fp32}
eval: {bootstrap: 10, every: 1}
save: {every: 1, keep: 2, background: never}
report_to: [tensorboard]
"""
_TIMED = ("seconds", "tokens_per_second", "sha256")  # of an evaluation, whose checksum covers the others
GIVEN = ("--warmup.steps", "0", "--objective.kl_coef", "0")  # of methods without rollouts
TRAIN = {
    "real": (),
    "real in the background": ("--save.background", "always"),
    "sft": ("--method", "sft", *GIVEN),
    "LoRA, merged": ("--train.lora", '{"r": 2}', "--save.merge", "true", "--optim.lr", "0.01"),
    "tract": ("--method", "tract", *GIVEN, "--train.steps", "1", "--debug", "false", "--rollout.max_tokens", "80"),
}


class Curves:
    """A tracker that writes into the run's folder, in place of TensorBoard, which need not be installed."""

    def __init__(self, run: trackers.TrackedRun) -> None:
        self.file = run.folder / "curves.txt"

    def log(self, values: dict[str, float], step: int) -> None:
        """Write a line."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"{step} {sorted(values)}\n")

    def finish(self, status: int) -> None:
        """Nothing is kept back."""


def quick() -> None:
    """Figures of one pixel and a tracker of our own, in this process from now on."""
    from matplotlib.figure import Figure
    from PIL import Image

    Figure.savefig = lambda self, path, **_: Image.new("RGB", (1, 1)).save(path, format="png")
    trackers._TRACKERS["tensorboard"] = Curves
    trackers.package = lambda _: None


@dataclass
class Ended:
    """How a command ended: its status (None for an exception, whose traceback is in `said`), and what it printed."""

    status: int | None
    said: str


def call(main: Callable[[list[str]], int], argv: Sequence[object]) -> Ended:
    """A command, as the shell would call it."""
    with io.StringIO() as said:
        status = None
        with redirect_stderr(said), redirect_stdout(said):
            try:
                status = main([str(part) for part in argv])
            except (Exception, SystemExit):
                traceback.print_exc()
        return Ended(status, said.getvalue())


class Home:
    """A folder with a model and rows, and runs on them.

    Args:
        folder: Made, where it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.model = self.folder / "model"
        if not self.model.is_dir():
            make_model(self.model)
            for name, count in (("train", 6), ("eval", 2)):
                write_jsonl(self.folder / f"{name}.jsonl", [_row(name, i) for i in range(count)])
            text = _SETTINGS
            for name in ("train", "eval"):
                text = text.replace(name.upper(), json.dumps(str(self.folder / f"{name}.jsonl")))
            (self.folder / "run.yaml").write_text(text, encoding="utf-8")

    def train(self, output: Path, *more: str) -> Ended:
        """real-fast train."""
        from real_fast.train import main

        own = ["--config", self.folder / "run.yaml", "--model", self.model, "--output", output]
        return call(main, [*own, *more])

    def evaluate(self, output: Path, *more: str) -> Ended:
        """real-fast evaluate."""
        from real_fast.evaluate import main

        own = ["--model", self.model, "--data", self.folder / "eval.jsonl", "--output", output]
        own += ["--rollout.engine", "transformers", "--rollout.max_tokens", "6", "--prompt.template", "short"]
        return call(main, [*own, "--bootstrap", "10", *more])

    def judge(self, output: Path, *more: str) -> Ended:
        """real-fast judge, whose standard output is the file ``graded.jsonl`` in a folder."""
        from real_fast.judge import main

        output.mkdir(exist_ok=True)
        own = ["--model", self.model, "--data", self.folder / "train.jsonl", "--batch_size", "2"]
        own += ["--rollout.engine", "transformers", "--rollout.max_tokens", "6", "--prompt.template", "short"]
        sys.stdout.flush()
        kept = os.dup(1)
        file = os.open(output / "graded.jsonl", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.dup2(file, 1)
            return call(main, [*own, *more])
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            os.close(file)

    def compare(self, output: Path, *more: str) -> Ended:
        """real-fast compare, of the run in ``whole``."""
        from real_fast.compare import main

        if not (self.folder / "whole").is_dir():
            self.train(self.folder / "whole")
        return call(main, [self.folder / "whole", "--output", output, "--bootstrap", "10", *more])


def prepare(folder: Path) -> Home:
    """What the trials run on."""
    quick()
    return Home(folder)


def _row(name: str, i: int) -> dict[str, Any]:
    return {
        "instruction": f"Question {i} to {name}?",
        "response": f"Answer {i}.",
        "rubric": "Is it right?",
        "score": 1 + i % 5,
        "feedback": f"It is answer {i}.",
    }


def outcome(output: Path) -> dict[str, Any]:
    """All that a run is worth: weights, checkpoints, metrics, rollouts, evaluations, without what the clock says."""
    found: dict[str, Any] = {}
    for folder in [output, *([output / "stage1"] if (output / "stage1").is_dir() else [])]:
        name = folder.relative_to(output).as_posix()
        for made in ("final", "adapter", "reference"):
            found |= {f"{name}/{made}/{k}": v for k, v in _sums(folder / made).items()}
        for checkpoint in complete(folder / "checkpoints"):
            sums = _sums(checkpoint)
            sums.pop("trainer_state.json", None)  # has seconds
            sums.pop("logged.json", None)  # the same
            sums.pop("fingerprints.json", None)  # of a resumed run, has `resume`
            found |= {f"{name}/{checkpoint.name}/{k}": v for k, v in sums.items()}
        if (folder / "metrics.jsonl").is_file():
            found[f"{name}/metrics"] = metric_lines(folder)
        for file in ("rollouts.jsonl", "predictions.jsonl", "self_generated.jsonl", "held_out.jsonl"):
            if (folder / file).is_file():
                found[f"{name}/{file}"] = read_jsonl(folder / file)
        for path in sorted((folder / "eval").glob("*.json*")):
            found[f"{name}/eval/{path.name}"] = [_timeless(line) for line in _values(path)]
        if (folder / "summary.json").is_file():
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            found[f"{name}/summary"] = {k: _timeless(v) for k, v in summary["eval"].items()}
        found[f"{name}/plots"] = [*sorted(p.name for p in folder.glob("*.png")), (folder / "report.html").is_file()]
    return found


def difference(want: dict[str, Any], got: dict[str, Any]) -> str | None:
    """The first thing in which two outcomes differ."""
    for key in sorted(want.keys() | got.keys()):
        if key not in want and "/step-" in key:
            continue  # a checkpoint more is none too few
        if key not in got or key not in want:
            return f"{key} is {'missing' if key in want else 'there, and should not be'}"
        if want[key] != got[key]:
            return f"{key} is another than of the undisturbed run"
    return None


def _values(path: Path) -> list[Any]:
    try:
        return list(read_jsonl(path)) if path.suffix == ".jsonl" else [json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError) as error:
        return [str(error)]


def _timeless(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: _timeless(v) for k, v in value.items() if k not in _TIMED}


def _sums(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "checksums.json"]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
