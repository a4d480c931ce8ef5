"""What the head benchmark times is one loss: every contender against full logits in float64, at tiny shapes."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import head, peers
from benchmarks.head import NAMES, Shape, contenders, errors, left_out

CPU = torch.device("cpu")
TINY = Shape(24, 16, 160, torch.float32)


def skip_if_left_out(name, device):
    if reason := left_out(device).get(name):
        pytest.skip(reason)


@pytest.mark.parametrize("name", NAMES)
def test_every_contender_agrees_with_float64(name):
    skip_if_left_out(name, CPU)
    error = errors(contenders(CPU)[name], TINY, CPU)
    assert error.loss < 1e-5 and error.gradient < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("ours")])
def test_ours_is_no_further_off_than_eager_on_a_gpu(name):
    device = torch.device("cuda")
    error, eager = (head.errors_of(n, torch.bfloat16, device) for n in (name, "eager"))
    assert error.loss < 1e-3 and error.gradient < eager.gradient


@pytest.mark.parametrize("wrong", ["loss", "hidden", "weight"])
def test_a_wrong_contender_is_found_out(wrong):
    def factory(hidden, weight, targets):
        # A gradient or a value that is off by 1 %, and nothing else.
        h = hidden * 1.01 + (hidden * -0.01).detach() if wrong == "hidden" else hidden
        w = weight * 1.01 + (weight * -0.01).detach() if wrong == "weight" else weight
        right = peers.cross_entropy(h, w, targets)
        return lambda: right + 0.01 * right.detach() if wrong == "loss" else right

    error = errors(factory, TINY, CPU)
    found = error.loss if wrong == "loss" else error.gradient
    assert found == pytest.approx(0.01, rel=1e-2)
    assert (error.gradient if wrong == "loss" else error.loss) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_forward_alone_gives_the_same_loss(name):
    skip_if_left_out(name, CPU)
    hidden, weight, targets = head.make_inputs(TINY, CPU)
    with torch.no_grad():
        loss = contenders(CPU)[name](hidden.detach(), weight.detach(), targets)()
        torch.testing.assert_close(loss, peers.cross_entropy(hidden, weight, targets))
    assert not loss.requires_grad and hidden.grad is None and weight.grad is None


def test_every_name_runs_or_has_a_reason():
    runs, reasons = contenders(CPU), left_out(CPU)
    assert {*runs, *reasons} == set(NAMES) and not {*runs} & {*reasons}
    assert all(len(reason) > 10 for reason in reasons.values())
    assert {"liger", "cce", "quack"} <= set(reasons)  # kernels for a GPU alone
    assert {"ours forward", "ours recompute", "ours forward, small budget", "eager"} <= set(runs)


def test_what_a_missing_package_or_function_is_called(monkeypatch):
    monkeypatch.setattr(peers, "_broken", {})
    monkeypatch.setitem(__import__("sys").modules, "liger_kernel.chunked_loss", None)
    assert "liger-kernel" in left_out(CPU)["liger grpo"] and "liger grpo" not in contenders(CPU)
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    assert torch.__version__ in left_out(CPU)["torch linear_cross_entropy"]


def test_logits_that_do_not_fit_are_left_out_and_only_theirs():
    huge = Shape(10**7, 64, 10**6)
    assert "GiB" in head.unsuitable("eager", huge, CPU)
    assert not head.unsuitable("ours forward", huge, CPU) and not head.unsuitable("eager", TINY, CPU)


def test_small_budget_is_an_eighth_of_the_rows(monkeypatch):
    seen = {}

    def spy(*_, **options):
        seen.update(options)
        return torch.zeros(()), torch.zeros(())

    monkeypatch.setattr(head, "weighted_logprob", spy)
    contenders(CPU)["ours forward, small budget"](*head.make_inputs(TINY, CPU))()
    assert seen["head"].chunk_bytes == TINY.n // 8 * TINY.v * 4 and seen["head"].mode == "forward"


@pytest.fixture
def no_collections(monkeypatch):
    """Looking for garbage after each contender takes a third of a second, among the objects of a whole test run."""
    monkeypatch.setattr(head.gc, "collect", lambda: 0)


def test_run_records_everything_and_flags_larger_errors(no_collections, monkeypatch, capsys):
    lines, absent = [], []
    monkeypatch.setattr(head, "append", lambda *line: lines.append(line))
    monkeypatch.setattr(head, "append_absence", lambda *line: absent.append(line))
    monkeypatch.setattr(head, "matmul_rate", lambda *_: 1e12)
    monkeypatch.setattr(head, "SMALL_SHAPES", (TINY,))
    wrong = head.Errors(0.0, 1.0)
    right = head.Errors(0.0, 1e-7)
    monkeypatch.setattr(head, "errors_of", lambda name, *_: wrong if name == "ours recompute" else right)
    monkeypatch.setattr(head, "left_out", lambda _: {name: "not here" for name in NAMES if name != "ours recompute"})
    assert head.run(CPU, small=True, deadline=time.monotonic() + 60) == 0
    assert {name for _, name, _ in absent} == set(NAMES) - {"ours recompute"}
    assert [line[:4] for line in lines] == [
        ("head", "V=160 D=16 fp32", "ours recompute", f"N=24 {case}") for case in ("forward+backward", "forward")
    ]
    values = lines[0][4]
    assert values["gradient_error"] == (1.0, "relative") and values["gradient_error_over_eager"][0] > 1e6
    assert values["of_matmul_rate"][0] == pytest.approx(6 * 24 * 16 * 160 / values["seconds"][0] / 1e12)
    assert "gradient_error" not in lines[1][4]
    out = capsys.readouterr().out
    assert "gradient off by 1.0e+00" in out and "eager left out: not here" in out


def test_run_stops_at_the_deadline_and_survives_a_failure(no_collections, monkeypatch, capsys):
    for name in ("append", "append_absence"):  # not into the results that we show
        monkeypatch.setattr(head, name, lambda *line: None)
    monkeypatch.setattr(head, "matmul_rate", lambda *_: 1e12)
    assert head.run(CPU, small=True, deadline=time.monotonic() - 1) == 0
    assert "no time left" in capsys.readouterr().out

    def broken(*_):
        raise RuntimeError("kaput\nmore")

    monkeypatch.setattr(head, "bench", broken)
    monkeypatch.setattr(head, "SMALL_SHAPES", (TINY,))
    assert head.run(CPU, small=True, deadline=time.monotonic() + 60) == 2 * len(contenders(CPU))
    assert "failed: RuntimeError: kaput\n" in capsys.readouterr().out
