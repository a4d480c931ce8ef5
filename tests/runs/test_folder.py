"""A run's folder: how much room it needs."""

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
