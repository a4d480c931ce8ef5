"""What counts as a difference from a golden trajectory: every bit here, 1e-5 elsewhere, nothing behind another draw."""

from __future__ import annotations

import copy
import json

import pytest

from tests.golden.trajectories import FOLDER, differences


@pytest.fixture
def want():
    return json.loads((FOLDER / "real-kl.json").read_text(encoding="utf-8"))


def elsewhere(golden):
    other = copy.deepcopy(golden)
    other["machine"]["cpu"] = "another"
    return other


def test_the_same_is_the_same_here_and_elsewhere(want):
    assert not differences(want, copy.deepcopy(want)) and not differences(want, elsewhere(want))


@pytest.mark.parametrize("key", ["loss", "loss/refinement", "grad_norm", "reward", "advantage_std", "kl", "nll"])
def test_a_last_bit_counts_here_and_a_thousandth_elsewhere(want, key):
    for factor, found in ((1 + 1e-12, False), (1.001, True)):
        got = copy.deepcopy(want)
        got["run"]["updates"][-1][key] *= factor
        if key.startswith("loss") or key == "kl":  # held to what the terms are exact to: more than a thousandth of it
            got["run"]["updates"][-1][key] += 0.01 * found
        assert differences(want, got), key
        assert bool(differences(want, elsewhere(got))) == found, key


def test_a_token_at_the_clip_counts_here_alone():
    want = json.loads((FOLDER / "real-iterations.json").read_text(encoding="utf-8"))
    for change, found in ((0.004, False), (0.05, True)):
        got = copy.deepcopy(want)
        got["run"]["updates"][-1]["clip_ratio/region_mean"] += change
        assert differences(want, got)
        assert bool(differences(want, elsewhere(got))) == found


def test_other_weights_count(want):
    got = copy.deepcopy(want)
    got["run"]["weights"]["sha256"] = "0"
    assert differences(want, got) and not differences(want, elsewhere(got))
    got["run"]["weights"]["norm_and_wave"]["model.norm.weight"][1] += 1e-3
    assert differences(want, elsewhere(got))


def test_what_follows_another_draw_is_compared_here_alone(want):
    got = copy.deepcopy(want)
    for update in got["run"]["updates"][4:]:  # of 2 of the warm-up and 5 more
        update |= {"sampled": "other", "loss": 99.0}
    got["run"]["weights"]["norm_and_wave"]["model.norm.weight"][1] += 1
    assert differences(want, got) and not differences(want, elsewhere(got))
    got["run"]["updates"][3]["loss"] += 1
    assert differences(want, elsewhere(got))


def test_tracts_second_stage_depends_on_what_the_first_wrote():
    want = json.loads((FOLDER / "tract.json").read_text(encoding="utf-8"))
    got = copy.deepcopy(want)
    got["generated"], got["stage2"]["updates"][0]["loss"] = "other", 0.0
    assert differences(want, got) and not differences(want, elsewhere(got))
