"""Every case of operators.py; see test_gpu_lint.py, which runs this file in a process of its own."""

from __future__ import annotations

import pytest

from tests.gpu_lint import operators
from tests.gpu_lint.operators import CASES, MAY_WAIT


@pytest.mark.parametrize("name", CASES)
def test_the_head(name):
    """No launch is refused, the gradients are those of the CPU, and the host waits nowhere else than it may."""
    case = CASES[name]
    outcome, (loss, gradients) = operators.run(case), operators.on_the_cpu(case)
    assert outcome.gradients.keys() == gradients.keys()
    tolerance = 1e-3 if case.dtype == operators.FP32 else 0.03
    assert outcome.loss == pytest.approx(loss, rel=tolerance)
    for key, want in gradients.items():
        error = (outcome.gradients[key].float() - want).norm() / want.norm()
        assert error < tolerance, f"gradient of {key}: {error:.3f}"
    assert ("logits_kernel" in outcome.launches) == (case.head.impl == "triton")
    waits = {} if case.every_row and not case.valid else outcome.waits
    assert waits.keys() <= MAY_WAIT, waits.keys() - MAY_WAIT


def test_a_call_without_zero_rows_to_skip_waits_nowhere():
    assert not operators.run(CASES["real, every row"]).waits
