"""A score that is read from next to nothing is no score, or comes with a warning."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest

from real_fast import Judge
from real_fast import judge as command
from real_fast.judging.grade import MAX_OFF_SCALE, WARN_OFF_SCALE
from tests.judging.fakes import ROW, FakeEngine, rollout

Make = Callable[..., Judge]


def test_next_to_no_probability_on_the_scale_is_no_score(with_engine: Make) -> None:
    judge = with_engine(FakeEngine([rollout([1e-4, 1e-4, 1e-4], 2.0)]), renormalize=False)
    grade = judge.grade(**ROW)
    assert grade.score is None and "0.9997 of the probability lies outside the scores" in (grade.error or "")
    assert grade.off_scale_mass == pytest.approx(0.9997) and grade.feedback == "Good." and grade.decoded == 2.0
    assert grade.distribution == pytest.approx({"1": 1e-4, "2": 1e-4, "3": 1e-4})  # for who wants it all the same


@pytest.mark.parametrize(
    ("mass", "score", "doubted"),
    [(WARN_OFF_SCALE - 0.01, True, False), (WARN_OFF_SCALE + 0.01, True, True), (MAX_OFF_SCALE + 0.01, False, False)],
)
def test_the_documented_bounds(with_engine: Make, mass: float, score: bool, doubted: bool) -> None:
    grade = with_engine(FakeEngine([rollout([1 - mass - 2e-9, 1e-9, 1e-9])]), renormalize=False).grade(**ROW)
    assert (grade.score is not None, grade.error is None, grade.warning is not None) == (score, score, doubted)


def test_the_scores_own_softmax_and_written_scores_stay(with_engine: Make) -> None:
    """With the first the score is on the scale, whatever the rest; the second was read from no probability."""
    engine = FakeEngine([rollout([3e-4, 1e-4, 1e-9], 2.0)])
    grade = with_engine(engine, renormalize=True).grade(**ROW)
    assert grade.score == pytest.approx(1.25, abs=1e-3) and "0.9996 of the probability" in (grade.warning or "")
    written = with_engine(engine, renormalize=False, protocol="decode").grade(**ROW)
    assert (written.score, written.error, written.warning) == (2.0, None, None)


def test_on_json_lines_and_under_prometheus_evals_names(with_engine: Make) -> None:
    judge = with_engine(FakeEngine([rollout([0.7, 1e-9, 1e-9])]), renormalize=False)
    out = io.BytesIO()
    rows = b"".join(json.dumps(row).encode() + b"\n" for row in (ROW, ROW))
    done = command.run(command.JudgeConfig(model="m"), io.BytesIO(rows), out, lambda: judge)
    assert (done.rows, done.failed, done.doubted) == (2, 0, 2) and "line 1: 0.3 of" in done.first_doubt
    assert "pulls the score towards 0" in json.loads(out.getvalue().splitlines()[0])["grade"]["warning"]
    with pytest.warns(UserWarning, match="pulls the score towards 0"):
        assert judge.single_absolute_grade("a", "b", "c")[1] == pytest.approx(0.7)
