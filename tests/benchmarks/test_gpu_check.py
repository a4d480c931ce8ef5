"""gpu_check: the order of its stages, what is kept when one fails or is cut off, and each stage on a CPU."""

from __future__ import annotations

import itertools
import os
import sys
import tarfile
import time

import pytest
import torch

from benchmarks import gpu_check, record
from benchmarks.gpu import attention, card, exact, head_phases, order, sanitizer, stages
from benchmarks.gpu.archive import NAME, pack
from benchmarks.gpu.stages import Check, Stage, attempt, run
from benchmarks.head import Shape
from real_fast.attention import flash
from tests.attention.plain_flash import plain_flash

CPU = torch.device("cpu")


@pytest.fixture
def check(tmp_path, monkeypatch):
    """A check whose results go nowhere else; collections of garbage take a third of a second in a whole test run."""
    monkeypatch.setattr(stages.gc, "collect", lambda: 0)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "out")
    for name in ("out", "details"):
        (tmp_path / name).mkdir()
    return Check(tmp_path / "out", tmp_path / "details", CPU, True, time.monotonic() + 600)


def held(check):
    with tarfile.open(check.out / NAME) as archive:
        return sorted(archive.getnames())


def writes(folder, name):
    def work(check, end):
        (getattr(check, folder) / name).write_text(name)
        return 0

    return work


def test_the_first_five_minutes_and_what_comes_behind_them():
    found = order.stages()
    names = [stage.name for stage in found]
    first = ["card", "kernels against float64", "sanitizer", "varlen attention", "one update", "phases of the head"]
    assert names[:6] == first and sum(stage.seconds for stage in found[:6]) <= 300
    behind = ["tests", "head, ours and eager", "updates", "LoRA step", "head, peers", "updates of others"]
    assert names[6:] == [*behind, "flex attention"] and len(set(names)) == len(names)
    assert {"eager", "ours forward"} <= set(order.FIRST) and not {"liger", "trl chunked"} & set(order.FIRST)


def test_every_stage_leaves_an_archive(check):
    seen = []
    work = [writes("out", "a.csv"), writes("details", "b.txt"), lambda check, _: seen.append(held(check)) or 0]
    assert run(check, [Stage(f"s{i}", 60, do) for i, do in enumerate(work)]) == 0
    assert seen == [["a.csv", "b.txt", "gpu-check.txt"]]  # before the last stage had ended
    with tarfile.open(check.out / NAME) as archive:
        file = archive.extractfile("gpu-check.txt")
        assert file is not None and b"== done after" in file.read()
    assert sorted(path.name for path in check.out.iterdir()) == ["a.csv", NAME, "gpu-check.txt"]


def test_an_archive_takes_the_place_of_another_when_it_is_whole(check, monkeypatch):
    (check.out / "a").write_text("a")
    pack(check.out, (check.out, check.details))

    def full(*_, **__):
        raise OSError("no space is left")

    (check.out / "b").write_text("b")
    monkeypatch.setattr(tarfile.TarFile, "add", full)
    with pytest.raises(OSError):
        pack(check.out, (check.out, check.details))
    assert held(check) == ["a"]


def test_a_failing_stage_hides_none_behind_it_and_the_status_says_so(check, capsys):
    def breaks(*_):
        raise RuntimeError("kaput\nmore")

    done = []
    work = [breaks, lambda *_: 2, lambda *_: done.append("behind") or 0]
    assert run(check, [Stage(name, 60, do) for name, do in zip(("raises", "wrong", "fine"), work, strict=True)]) == 1
    assert done == ["behind"] and check.failed == ["raises", "wrong"]
    out = capsys.readouterr().out
    assert "raises failed: RuntimeError: kaput\n" in out and "something went wrong in: raises, wrong" in out
    assert (check.out / "gpu-check.txt").read_text() == out
    assert "Traceback" in (check.details / "errors.txt").read_text() and "errors.txt" in held(check)


def test_no_stage_begins_when_the_time_is_over(check, capsys):
    ends = []

    def work(check, end):
        ends.append(end)
        check.end = time.monotonic()
        return 0

    assert run(check, [Stage("first", 7, work), Stage("second", 7, work)]) == 0
    assert len(ends) == 1 and ends[0] <= time.monotonic() + 7 and check.left_out == ["second"]
    assert "second: left out, no time is left" in capsys.readouterr().out


def test_the_command_runs_the_stages_and_leaves_the_tests_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(order, "stages", lambda: [Stage(n, 9, lambda *_: 0) for n in ("card", "tests", "last")])
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(tmp_path / "out"), "--small", "--no-tests"])
    monkeypatch.setenv("REAL_FAST_RESULTS", "elsewhere")
    assert gpu_check.main() == 0
    out = capsys.readouterr().out
    assert "== 1 of 2, card" in out and "== 2 of 2, last" in out
    assert os.environ["REAL_FAST_RESULTS"] == str(tmp_path / "out")


def test_clocks_and_power_are_asked_for_one_by_one_where_a_driver_does_not_know_all(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "SMI", "an_smi_that_is_nowhere")
    assert card.state() == "an_smi_that_is_nowhere is not installed here"
    tool = tmp_path / "smi"
    tool.write_text('#!/bin/sh\ncase "$1" in *,*) exit 2;; *clocks.sm) echo "1980 MHz";; *) exit 2;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setattr(card, "SMI", str(tool))
    assert card.state() == "clocks.sm 1980 MHz"


def test_the_card_is_said_and_measured(check, monkeypatch, capsys):
    peak = card.roofline.Roofline(2e12, 3e11)
    monkeypatch.setattr(card.roofline, "measure", lambda *_: peak)
    assert card.measure(check, 0.0) == 0 and check.peak is peak
    out = capsys.readouterr().out
    assert "versions: python" in out and "torch" in out and "measured peak: 2.0 TFLOP/s, 0.30 TB/s" in out


ODD = (33, 40, 203)


@pytest.mark.parametrize("kind", ["forward", "recompute", "score", "entropy", "real"])
def test_kernels_are_held_to_float64(check, kind, capsys):
    assert exact.compare(check, [exact.Case(kind, *ODD), exact.Case(kind, *ODD, dtype="fp32")], check.end) == 0
    assert "2 cases" in capsys.readouterr().out


def test_every_case_is_there_at_real_and_at_odd_sizes():
    real, small = list(exact.cases(False)), list(exact.cases(True))
    assert {(c.kind, c.n, c.v) for c in real if c.n == 300} == {
        (kind, 300, 151_936) for kind in ("forward", "recompute", "score", "real", "entropy")
    }
    assert real[0].n == 300 and all(case.n < 300 for case in small) and set(small) < set(real)
    assert {case.dtype for case in small} == set(exact.DTYPES)
    assert {1} < {case.n for case in small} and any(c.off for c in small) and any(c.parts > 1 for c in small)
    assert any(case.softcap for case in small) and any(case.bias for case in small)


@pytest.mark.parametrize(
    ("name", "place", "kind", "what"),
    [
        ("weighted_logprob", 0, "forward", "dX"),
        ("weighted_logprob", 1, "forward", "logp"),
        ("linear_logprob", None, "recompute", "dW"),
        ("score_logprobs", None, "score", "dW"),
        ("logprob_and_entropy", 1, "entropy", "entropy"),
    ],
)
def test_a_result_that_is_off_is_found_and_an_error_in_one_case_does_not_end_the_others(
    check, monkeypatch, capsys, name, place, kind, what
):
    right = getattr(exact, name)
    calls = itertools.count()

    def wrong(*arguments, **options):
        if next(calls) == 0:
            raise RuntimeError("kaput")
        out = right(*arguments, **options)
        if place is None:
            return out * 1.01
        return tuple(x * 1.01 if i == place else x for i, x in enumerate(out))

    monkeypatch.setattr(exact, name, wrong)
    case = exact.Case(kind, *ODD)
    assert exact.compare(check, [case, case], check.end) >= 2
    out = capsys.readouterr().out
    assert f"{case.name}: {what} off by " in out and "kaput" in out and "2 cases" in out


def test_a_single_rows_miss_is_said_with_both_errors_and_is_no_failure(check, monkeypatch, capsys):
    def results(error, n):
        case = exact.Case("forward", n, 8, 17)
        return [exact.Result(case, "dX", error, 2.0e-3, exact.SLACK * 2.0e-3)]

    for n, error, wrong in ((1, 3.1e-3, 0), (2, 3.1e-3, 1), (1, 0.2, 1), (1, float("nan"), 1), (1, 2.2e-3, 0)):
        monkeypatch.setattr(exact, "results", lambda *_, error=error, n=n: results(error, n))
        assert exact.compare(check, [exact.Case("forward", n, 8, 17)], check.end) == wrong
        out = capsys.readouterr().out
        assert ("off by" in out) == (error != 2.2e-3)
        if (n, error) == (1, 3.1e-3):
            assert "dX off by 3.1e-03, eager's by 2.0e-03 (one row, so no failure)" in out


def test_no_case_begins_when_the_time_is_over(check, capsys):
    assert exact.compare(check, [exact.Case("forward", *ODD)] * 2, time.monotonic() - 1) == 0
    assert "no time left for 2 of 2 cases" in capsys.readouterr().out


TOOL = """#!{python}
import subprocess, sys
tool, kind, status, *command = sys.argv[1:]
assert (tool, kind) == ("--tool", "memcheck") and status == "--error-exitcode=9" and command[1:3] == ["-m", {module!r}]
print("========= ERROR SUMMARY: {errors} errors", flush=True)
{then}
"""


@pytest.mark.parametrize(
    ("then", "errors", "wrong", "said"),
    [
        ("sys.exit(0)", 0, 0, "ERROR SUMMARY: 0"),
        ("sys.exit(9)", 3, 1, "compute-sanitizer: faults; see sanitizer.txt"),
        ("sys.exit(1)", 0, 1, "compute-sanitizer: exit status 1"),
        ("import time; time.sleep(60)", 0, 0, "not done in 3 s, which says nothing"),
    ],
)
def test_the_sanitizer_looks_at_a_process_of_its_own(check, tmp_path, monkeypatch, capsys, then, errors, wrong, said):
    tool = tmp_path / sanitizer.NAME
    text = TOOL.format(python=sys.executable, module="benchmarks.gpu.exact", errors=errors, then=then)
    tool.write_text(text)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    end = time.monotonic() + (3 if "sleep" in then else 60)
    assert sanitizer.run(check, end) == wrong
    assert said in capsys.readouterr().out
    assert "SUMMARY" in (check.details / sanitizer.LOG).read_text()


def test_without_a_sanitizer_that_is_said(check, monkeypatch, capsys):
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    assert sanitizer.run(check, check.end) == 0
    assert "compute-sanitizer is not installed here" in capsys.readouterr().out


def test_what_the_sanitizer_looks_at_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["exact", "--cases", "1"])
    assert exact.main() == 0
    assert "1 cases" in capsys.readouterr().out
    monkeypatch.setattr(exact, "SLACK", 0.0)
    assert exact.main() == 0  # one row
    monkeypatch.setattr(exact, "cases", lambda small: [exact.Case("forward", *ODD)])
    assert exact.main() == 1


def test_varlen_attention_stands_beside_sdpa(check, monkeypatch, capsys):
    """By plain products in the place of the kernels of a GPU."""
    monkeypatch.setattr(flash, "_flash_attn_varlen_forward", None)
    monkeypatch.setattr(flash, "_flash_attn_varlen_backward", None)
    with plain_flash() as calls:
        assert attention.compare(check, "varlen") == 0
        assert calls and len(capsys.readouterr().out.splitlines()) == 4 * len(attention.WINDOWS)
        right = attention.prepare

        def wrong(layout, backend, device):
            made = right(layout, backend, device)
            return (lambda q, k, v, *how: made(q, k * 1.01, v, *how)) if backend == "varlen" else made

        monkeypatch.setattr(attention, "prepare", wrong)
        assert attention.compare(check, "varlen") == 8
    assert "WRONG" in capsys.readouterr().out


def test_attention_that_needs_a_card_is_left_out_and_one_that_breaks_is_counted(check, monkeypatch, capsys):
    assert attention.varlen(check, 0.0) == 0 and attention.flex(check, 0.0) == 0
    out = capsys.readouterr().out
    assert "varlen left out: it needs a CUDA device" in out and "flex left out" in out

    def breaks(*_):
        raise RuntimeError("kaput")

    monkeypatch.setattr(attention, "prepare", breaks)
    assert attention.compare(check, "sdpa") == 8 and "kaput" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mode", "phases"),
    [
        ("forward", {"forward, logits stored", "dlogits", "dX", "dW"}),
        ("recompute", {"forward, nothing stored", "dlogits, recomputed", "dX", "dW"}),
        ("evaluation", {"forward, nothing stored"}),
    ],
)
def test_phases_of_the_head_add_up(mode, phases):
    shape = Shape(40, 32, 256, torch.float32)
    found = head_phases.measure(shape, CPU, mode, "torch", 1)
    assert set(found) == phases | {"whole"}
    assert all(seconds > 0 for seconds in found.values())
    assert sum(seconds for name, seconds in found.items() if name != "whole") <= found["whole"] * 1.01


def test_a_phase_is_the_time_of_what_goes_by_its_name(monkeypatch):
    right = head_phases.head.mm_into

    def slow(*arguments):
        time.sleep(0.05)
        return right(*arguments)

    monkeypatch.setattr(head_phases.head, "mm_into", slow)
    found = head_phases.measure(Shape(40, 32, 256, torch.float32), CPU, "forward", "torch", 1)
    assert found["dW"] >= 0.05 and head_phases.head.mm_into is slow  # put back


def test_the_phases_stand_beside_plain_products(check, monkeypatch, capsys):
    lines = []
    monkeypatch.setattr(head_phases, "append", lambda *line: lines.append(line))
    monkeypatch.setattr(head_phases, "matmul_rate", lambda *_: 1e12)
    assert head_phases.run(check, check.end) == 0
    assert [line[2:4] for line in lines] == [("torch.mm", "N=40 products")] + [
        ("default", f"N=40 {mode}") for mode in head_phases.MODES
    ]
    assert all("seconds" in line[4] and "of_matmul_rate" in line[4] for line in lines)
    assert {f"seconds/{name}" for name in ("logits", "dX", "dW")} < set(lines[0][4])
    assert "dlogits" in capsys.readouterr().out
    monkeypatch.setattr(head_phases, "measure", lambda *_: 1 / 0)
    assert head_phases.run(check, check.end) == 3


def test_a_card_has_its_tiles_and_candidates(monkeypatch):
    monkeypatch.setattr(head_phases, "architecture", lambda _: "sm_90")
    found = head_phases.ways(CPU)
    shipped = head_phases.tiles.TILES["sm_90"]
    assert found["default"] == shipped[0] and tuple(found.values())[: len(shipped)] == shipped
    tried = head_phases.CANDIDATES["sm_90"]
    assert list(found.values())[len(shipped) :] == list(tried) and not set(tried) & set(shipped)
    # Of shared memory, 227 KiB are there: a stage holds a tile of hidden states and one of the weight, in 16 bits.
    assert all(2 * tile.stages * tile.depth * (tile.rows + tile.columns) < 227 * 1024 for tile in tried)


def test_a_part_that_fails_gives_nothing(check):
    assert attempt(check, "fine", lambda: 3) == (3, True)
    assert attempt(check, "not", lambda: 1 / 0) == (None, False)


def test_a_report_that_fails_does_not_hide_what_was_measured(check, monkeypatch, capsys):
    monkeypatch.setattr(order.head, "run", lambda *_, **__: 0)
    monkeypatch.setattr(order.report, "main", lambda: 1 / 0)
    assert order._head(check, check.end) == 1 and "report failed" in capsys.readouterr().out
