"""A run's folder: how much room it needs, and what a kill has left there."""

from __future__ import annotations

import shutil

import pytest

from real_fast.config import Config, DataConfig
from real_fast.errors import OutputError
from real_fast.runs.folder import RunFolder

PARAMETERS, KEEP = 1000, 2
NEED = PARAMETERS * 4 * (3 * (KEEP + 1) + 1)


@pytest.mark.parametrize(
    ("on_disk", "resume_from", "makes_room"),
    [
        ((), None, 0),
        (("step-000001", "step-000002"), "step-000002", 2000),
        (("step-000001", "step-000002.damaged", "mine"), "step-000001", 1000),  # these stay
        (("step-000001", "step-000002"), "step-000001", 1000),  # the newer one is damaged, and will be kept
        (("step-000001", "step-000002"), None, 0),  # of an earlier run, which is moved aside
    ],
)
def test_room_is_made_by_checkpoints_that_will_be_replaced_alone(
    tmp_path, monkeypatch, on_disk, resume_from, makes_room
):
    folder = RunFolder(Config(output=str(tmp_path), model="m", data=DataConfig(train="t")))
    for name in on_disk:
        (folder.checkpoints / name).mkdir(parents=True)
        (folder.checkpoints / name / "trainer_state.json").write_bytes(b"0" * 1000)
    resumed = folder.checkpoints / resume_from if resume_from else None
    for free, fits in ((NEED - makes_room, True), (NEED - makes_room - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(free, 0, free))
        if fits:
            folder.check_space(PARAMETERS, KEEP, False, resumed)
        else:
            with pytest.raises(OutputError, match="and the checkpoints need"):
                folder.check_space(PARAMETERS, KEEP, False, resumed)


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    left = [
        ".summary.json.7.tmp",
        "eval/.before.json.7.tmp",
        "final.tmp/x",
        "adapter.replaced.tmp/x",
        "reference.tmp/x",
    ]
    kept = ["metrics.jsonl", "eval/before.json", "final/model.safetensors", "mine.tmp/x"]
    for name in (*left, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    config = Config(output=str(tmp_path), resume=True, model="m", data=DataConfig(train="t"))
    RunFolder(config).claim(config)
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert found == sorted([*kept, "config.yaml"])
