"""Every method's first updates are those that were written down; see trajectories.py."""

from __future__ import annotations

import copy
import json

import pytest

from real_fast.training import setup
from tests.golden.trajectories import CASES, FOLDER, differences, record


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """Every case trains on the same generated rows, which take as long to parse and to encode as all its updates."""
    load, kept = setup.load_train_eval, {}

    def read(data, most, builder, scale, needed, key):
        asked = repr((data, most, builder.source, builder.system, scale, needed))
        if asked not in kept:
            kept[asked] = load(data, most, builder, scale, needed, key)
        return copy.deepcopy(kept[asked])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "load_train_eval", read)
        yield


@pytest.mark.parametrize("case", CASES)
def test_trajectory_is_the_golden_one(case, golden_model, tmp_path):
    want = json.loads((FOLDER / f"{case}.json").read_text(encoding="utf-8"))
    found = differences(want, record(case, golden_model, tmp_path / case))
    assert not found, f"{len(found)} numbers differ from tests/golden/{case}.json; the first: " + "; ".join(found[:5])


def test_every_case_has_its_file_and_every_file_its_case():
    assert {file.stem for file in FOLDER.glob("*.json")} == CASES.keys()
