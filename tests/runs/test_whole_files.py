"""Every file of a run is whole or not there: written under a temporary name and renamed, or lines that are appended."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

from real_fast.compare import main as compare
from real_fast.evaluate import main as evaluate
from real_fast.train import main
from real_fast.utils.jsonio import read_jsonl, write_jsonl
from tests.distributed.ranks import run_ranks
from tests.helpers import flags

# Lines, of which a kill cuts off the last; the lock; and what TensorBoard appends to, whose readers know of that.
APPENDED = re.compile(r"(stage1/)?((metrics|rollouts)\.jsonl|\.lock|tensorboard/.*)")


def watched(folder, commands):
    """The commands' statuses; files that were opened for writing or cut, and new names of files and folders.

    Runs in a process of its own: the hook stays for good.
    """
    written, renamed = [], []

    def hook(event, args):
        opened = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR) and not Path(args[0]).is_dir()
        if (opened or event == "os.truncate") and isinstance(args[0], str | os.PathLike):
            written.append(os.fspath(args[0]))
        elif event in ("os.rename", "os.link"):
            renamed.append(os.fspath(args[1]))

    sys.modules["trackio"] = SimpleNamespace(init=Mock(), log=Mock(), finish=Mock())
    sys.addaudithook(hook)
    statuses = [{"train": main, "evaluate": evaluate, "compare": compare}[name](argv) for name, argv in commands]

    def below(paths):
        return [os.path.relpath(path, folder) for path in paths if Path(path).is_relative_to(folder)]

    return statuses, below(written), below(renamed)


def not_whole(folder, written, renamed):
    """Files under their final names that a reader, or a kill, could have met half-written."""
    opened = [
        path
        for path in written
        if not any(part.endswith(".tmp") for part in Path(path).parts) and not APPENDED.fullmatch(path)
    ]
    # What libraries write without Python's open(): it must have got its name, or its folder's, by a rename.
    there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    by_rename = {name for name in renamed if not name.endswith(".tmp")}
    whole = [
        path for path in there if path in by_rename or any(str(p) in by_rename for p in Path(path).parents)
    ]  # fmt: skip
    return sorted({*opened, *(path for path in there if path not in whole and not APPENDED.fullmatch(path))})


def test_every_file_of_a_run_gets_its_name_when_it_is_whole(tiny_judge, tmp_path):
    """Adapters merged and apart, a profile, trackers, a rejected row, an extended run."""
    folder = tmp_path / "run"
    argv = flags(tiny_judge, folder, "--train.lora.r", "4", "--save.merge", "--objective.kl_coef", "0.1")
    argv += ["--profile", "1", "--report_to", "trackio", "--train.steps", "2", "--data.max_eval", "4"]
    rows = tmp_path / "rows.jsonl"
    write_jsonl(rows, [*read_jsonl(tiny_judge / "train.jsonl"), {"id": "no score"}])
    argv += ["--data.train", str(rows)]
    commands = [("train", argv), ("train", [*argv, "--resume", "--train.steps", "3"])]
    [(statuses, written, renamed)] = run_ranks(1, watched, folder, commands, group=False, timeout=120)
    assert statuses == [0, 0]
    assert not not_whole(folder, written, renamed)
    names = {"config.yaml", "summary.json", "trackers.json", "report.html", "rejected.jsonl", "final", "training.png"}
    assert names | {"profile/trace.json", "superseded/2-steps/config.yaml", "adapter", "reference"} <= set(renamed)


def test_every_file_of_two_stages_an_evaluation_and_a_comparison_does(tiny_judge, tmp_path):
    folder = tmp_path / "run"
    tract = [
        "--method",
        "tract",
        "--supervised.prompts_per_step",
        "4",
        "--warmup.steps",
        "0",
        "--debug",
        "--data.max_train",
        "8",
    ]
    rows = str(tiny_judge / "eval.jsonl")
    judged = ["--model", str(folder / "final"), "--data", rows, "--output", str(folder / "judged")]
    judged += [
        "--rollout.engine",
        "transformers",
        "--rollout.max_tokens",
        "4",
        "--precision",
        "fp32",
        "--max_rows",
        "4",
    ]
    commands = [
        ("train", flags(tiny_judge, folder, *tract)),
        ("evaluate", [*judged, "--bootstrap", "10"]),
        ("evaluate", [*judged, "--bootstrap", "10", "--overwrite"]),
        ("compare", [str(folder), str(folder / "judged"), "--output", str(folder / "compared"), "--bootstrap", "10"]),
    ]
    [(statuses, written, renamed)] = run_ranks(1, watched, folder, commands, group=False, timeout=120)
    assert statuses == [0] * len(commands)
    assert not [path for path in not_whole(folder, written, renamed) if not path.endswith("/.lock")]
    assert {"self_generated.jsonl", "judged/summary.json", "compared/comparison.csv"} <= set(renamed)


def test_a_file_that_is_written_under_its_own_name_is_found(tmp_path):
    (tmp_path / "report.html").write_text("by a library", encoding="utf-8")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "whole").write_text("", encoding="utf-8")
    (tmp_path / "metrics.jsonl").touch()
    written = ["summary.json", "metrics.jsonl", ".config.yaml.7.tmp", "checkpoints/step-1.tmp/config.json"]
    assert not_whole(tmp_path, written, ["checkpoints"]) == ["report.html", "summary.json"]
