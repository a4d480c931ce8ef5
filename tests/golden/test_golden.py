"""Every method's first updates are those that were written down; see trajectories.py."""

from __future__ import annotations

import json

import pytest

from tests.golden.trajectories import CASES, FOLDER, differences, record


@pytest.mark.parametrize("case", CASES)
def test_trajectory_is_the_golden_one(case, golden_model, tmp_path):
    want = json.loads((FOLDER / f"{case}.json").read_text(encoding="utf-8"))
    found = differences(want, record(case, golden_model, tmp_path / case))
    assert not found, f"{len(found)} numbers differ from tests/golden/{case}.json; the first: " + "; ".join(found[:5])


def test_every_case_has_its_file_and_every_file_its_case():
    assert {file.stem for file in FOLDER.glob("*.json")} == CASES.keys()
