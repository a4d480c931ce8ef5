"""Every case of steps.py; see test_gpu_lint.py, which runs this file in a process of its own."""

from __future__ import annotations

import pytest

from tests.gpu_lint import steps
from tests.gpu_lint.host_waits import COMMAND, by_place, committed, differences
from tests.gpu_lint.steps import CASES


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return steps.make_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", CASES)
def test_an_update(name, model, tmp_path):
    """Nothing is refused, the numbers are those of the CPU, and the host waits where the list says."""
    case = CASES[name]
    outcome = steps.run(case, model, tmp_path / "pretended")
    half = case.train.get("precision") != "fp32"
    loss, norm = steps.on_the_cpu(case, model, tmp_path / "cpu")
    # Of bf16 the norm alone: REAL's loss is made of advantages, which rewards that hardly differ leave to rounding.
    assert outcome.grad_norm == pytest.approx(norm, rel=0.03 if half else 1e-4)
    assert half or outcome.loss == pytest.approx(loss, rel=1e-4)
    assert ("logits_kernel" in outcome.launches) == half  # else the lint has seen another head than the GPU's
    changed = differences(committed()[name], by_place(outcome.waits))
    assert not changed, f"{'; '.join(changed)}. If that is meant: {COMMAND}"


def test_the_list_has_every_case_and_no_other():
    assert committed().keys() == CASES.keys()
