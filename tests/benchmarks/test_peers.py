"""The peers' adapters: called by the signatures that their sources have, each against full logits."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types

import pytest
import torch

from benchmarks import head, peers, record
from benchmarks.head import Shape, errors
from benchmarks.peers import PEERS, cross_entropy
from tools.benchmark_tables import head_table, heads, left_out
from tools.tables import ROOT

CPU = torch.device("cpu")
TINY = Shape(24, 16, 160, torch.float32)


# As in apple/ml-cross-entropy, cut_cross_entropy/linear_cross_entropy.py at 3a79837.
def _cce(
    e, c, targets, bias=None, ignore_index=-100, softcap=None, reduction="mean", shift=0, filter_eps="auto",
    accum_e_fp32=False, accum_c_fp32=False, filter_e_grad=True, filter_c_grad=True, impl="cce",
    vocab_parallel_options=None,
):  # fmt: skip
    assert bias is None and softcap is None and reduction == "mean" and not shift
    return cross_entropy(e, c, targets)


# As in QuACK, quack/linear_cross_entropy.py at c7cbcb3.
def _quack(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True):
    assert reduction == "mean" and tuned
    return cross_entropy(x, weight, target)


# As in verl-project/verl, verl/utils/kernel/linear_cross_entropy.py at 04fb04c.
def _verl(hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
    assert isinstance(temperature, float) and reduction == "none" and dist_process_group is None
    logp = (hidden @ weight.t()).float().log_softmax(1)
    entropy = -(logp.exp() * logp).sum(1)
    return logp.gather(1, labels[:, None])[:, 0] / temperature, entropy


# As in liger_kernel/ops/cutedsl/ops/fused_linear_cross_entropy_sm90.py of Liger 0.8.5, which imports CUDA alone.
def _sm90(_input, weight, target, ignore_index=-100, reduction="mean"):
    assert reduction == "mean"
    return cross_entropy(_input, weight, target)


ELSEWHERE = {
    "cce": ("cut_cross_entropy", "linear_cross_entropy", _cce),
    "quack": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy", _quack),
    "verl": ("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy", _verl),
    "liger sm90": (
        "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90",
        "liger_fused_linear_cross_entropy_sm90",
        _sm90,
    ),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_peer_that_is_not_here_is_called_as_its_source_has_it(name, monkeypatch):
    module, function, stand_in = ELSEWHERE[name]
    made = types.ModuleType(module)
    setattr(made, function, stand_in)
    monkeypatch.setitem(sys.modules, module, made)
    error = errors(PEERS[name].make, TINY, CPU)
    assert error.loss < 1e-5 and error.gradient < 1e-5


def _needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


@_needs("trl")
def test_trl_s_function_takes_what_it_is_given_and_its_trainers_give_it_the_same():
    from trl.kernels import ChunkedLogProbFunction

    names = list(inspect.signature(ChunkedLogProbFunction.forward).parameters)
    assert names == [
        "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
        "logit_scale", "outputs",
    ]  # fmt: skip
    source = importlib.util.find_spec("trl.trainer.utils")
    assert source is not None and source.origin is not None
    with open(source.origin, encoding="utf-8") as file:
        assert "_CHUNKED_LOGPROB_CHUNK_SIZE = 32768\n" in file.read()


@_needs("liger_kernel")
def test_liger_s_sources_have_what_is_called():
    found = importlib.util.find_spec("liger_kernel")
    assert found is not None and found.submodule_search_locations is not None
    folder = f"{found.submodule_search_locations[0]}/ops"
    with open(f"{folder}/cutedsl/ops/fused_linear_cross_entropy_sm90.py", encoding="utf-8") as file:
        text = file.read()
    assert "def liger_fused_linear_cross_entropy_sm90(" + str(inspect.signature(_sm90))[1:].replace("'", '"') in text
    assert "if m % TILE_M != 0:" in text and "if v % TILE_N != 0:" in text and "BF16 input and weight only" in text
    with open(f"{folder}/fused_linear_scaled_cross_entropy.py", encoding="utf-8") as file:
        text = file.read()
    assert "class LigerFusedLinearScaledCrossEntropyFunction" in text and "fused_scaled_cross_entropy_sm90" in text


def test_a_shape_that_a_peer_does_not_take_is_said():
    assert "256" in head.unsuitable("liger sm90", Shape(8192, 4096, 151_936), CPU)
    assert not head.unsuitable("liger sm90", Shape(8192, 4096, 128_256), CPU)
    assert "bfloat16" in head.unsuitable("liger sm90", Shape(128, 64, 256, torch.float32), CPU)
    assert head.unsuitable("quack", Shape(9, 64, 256), CPU) and not peers.unsuitable(
        "ours forward", 9, 7, torch.float32
    )


@pytest.mark.parametrize("name", ["cce", "quack", "verl", "liger", "liger scaled", "trl chunked"])
def test_a_package_that_is_not_installed_is_said_to_be(name, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: None)
    assert PEERS[name].absent(CPU).startswith("not installed: pip install --no-deps ")


def test_a_package_that_breaks_is_left_out(monkeypatch):
    monkeypatch.setattr(peers, "_broken", {})
    monkeypatch.setitem(sys.modules, "trl", types.ModuleType("trl"))  # which has no kernels
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: object())
    monkeypatch.delitem(sys.modules, "trl.kernels", raising=False)
    for _ in range(2):  # by trying, then without
        assert PEERS["trl chunked"].absent(CPU).startswith("trl does not import here: ModuleNotFoundError")
    assert list(peers._broken) == ["trl.kernels"]


def line(suite, model, variant, case, metric, value, run="1", machine="m"):
    return {
        "run": run, "machine": machine, "suite": suite, "model": model, "variant": variant, "case": case,
        "metric": metric, "value": str(value),
    }  # fmt: skip


def test_what_did_not_run_has_a_line_in_the_table():
    lines = [
        line("head", "V=8 D=4 bf16", "eager", "N=2 forward+backward", metric, 0.5)
        for metric in ("seconds", "of_matmul_rate", "gradient_error")
    ]
    left = "head left out"
    lines += [line(left, "-", "cce", "not installed: pip install x", "left_out", 1, run=run) for run in ("0", "1")]
    lines += [line(left, "-", "verl", "of an earlier run", "left_out", 1, run="0")]
    lines += [line(left, "V=8 D=4 bf16", "liger sm90", "takes multiples of 256 alone", "left_out", 1)]
    lines += [line(left, "V=9 D=4 bf16", "quack", "at another shape", "left_out", 1)]
    table = heads(lines)
    assert "| CCE | not installed | | | | |" in table
    assert "| Liger fused CE, SM90 | takes multiples of 256 alone | | | | |" in table
    assert "verl" not in table and "QuACK" not in table
    assert head_table({}, left_out(lines, "head")) == "" and (ROOT / "benchmarks").is_dir()


def test_a_run_records_what_is_left_out(monkeypatch, capsys):
    lines = []
    monkeypatch.setattr(record, "append", lambda *line: lines.append(line))
    monkeypatch.setattr(head, "matmul_rate", lambda *_: 1e12)
    monkeypatch.setattr(head, "SMALL_SHAPES", ())
    assert head.run(CPU, small=True, deadline=0.0, names=["cce", "eager"]) == 0
    assert [recorded[:3] for recorded in lines] == [("head left out", "-", "cce")]
    assert "head: cce left out: " in capsys.readouterr().out
