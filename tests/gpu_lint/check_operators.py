"""Every case of operators.py; see test_gpu_lint.py, which runs this file in a process of its own."""

from __future__ import annotations

import pytest

from real_kernels import weighted_logprob
from tests.gpu_lint import operators
from tests.gpu_lint.launches import checked_launches
from tests.gpu_lint.operators import CASES, MAY_WAIT
from tests.gpu_lint.pretend import cuda_device


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
    assert bool({"logits_kernel", "persistent_kernel"} & outcome.launches.keys()) == (case.head.impl == "triton")
    assert ("persistent_kernel" in outcome.launches) == case.persistent
    if case.main_grad or case.head.unit_gradient:
        assert "scale_kernel" not in outcome.launches
    waits = {} if case.every_row and not case.valid else outcome.waits
    assert waits.keys() <= MAY_WAIT, waits.keys() - MAY_WAIT


def test_gradients_are_multiplied_only_where_nobody_vouches_for_a_gradient_of_1():
    multiplied = operators.run(CASES["real"]).launches["scale_kernel"]
    assert multiplied == 3  # of text rows, score rows and the weight


def test_an_upstream_gradient_that_was_to_be_1_fails_on_the_device():
    case = CASES["weighted, gradient of 1"]
    with cuda_device(), checked_launches():
        t = {name: operators._to_device(x) for name, x in operators.tensors(case).items()}
        loss = weighted_logprob(
            t["hidden"].requires_grad_(), t["weight"], t["targets"], t["coefficients"], head=case.head
        )[0]
        with pytest.raises(RuntimeError, match="unit_gradient"):
            (2 * loss).backward()


def test_a_call_without_zero_rows_to_skip_waits_nowhere():
    assert not operators.run(CASES["real, every row"]).waits
