"""The LoRA step of gpu_check: the same code on a CPU with a tiny model, its peaks beside the plan, and its failures."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check, lora_step, record, report
from benchmarks.gpu import order, stages
from benchmarks.gpu.cases import CASES, Case
from benchmarks.lora_run import LARGE, PEAKS, SMALL, planned, run_config
from benchmarks.random_model import byte_tokenizer, parameters, write_model
from real_fast.model.load import load_model, load_tokenizer
from real_fast.planning.count import empty_model
from real_fast.planning.memory import ModelSizes
from real_fast.planning.shape import known_models

NEEDS_PEFT = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
GIB = 2**30


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{lora_step.ROOT}{os.pathsep}{lora_step.ROOT / 'kernels'}")
    return tmp_path


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_step, "VLLM", "a_vllm_that_is_nowhere")


def lines_of(folder: Path) -> dict[str, tuple[str, float]]:
    with (folder / "benchmarks.csv").open(newline="") as file:
        return {line["metric"]: (line["variant"], float(line["value"])) for line in csv.DictReader(file)}


def ends_by(code: str) -> Callable[..., list[str]]:
    """A process in place of the run, which tells two facts and then does `code`."""

    def command(folder: Path, facts: Path, engine: str, small: bool, others: int) -> list[str]:
        told = [{"what": "begin", "phase": "load"}, {"what": "begin", "phase": "update 1: rollouts"}]
        text = "".join(json.dumps(fact) + "\n" for fact in told)
        return [sys.executable, "-c", f"import os, time; open({str(facts)!r}, 'a').write({text!r}); {code}"]

    return command


@pytest.mark.parametrize("case", [SMALL, *CASES], ids=lambda case: case.name)
def test_weights_are_counted_by_arithmetic(case: Case) -> None:
    assert parameters(case) == sum(p.numel() for p in empty_model(case.config()).parameters())


def test_the_large_model_is_qwen3_8b() -> None:
    assert parameters(LARGE) == known_models()["Qwen/Qwen3-8B"]["sizes"]["parameters"]
    assert LARGE.budget >= 4 * (LARGE.p + LARGE.k * (LARGE.r + 50))  # a phrase of a token a letter comes behind


def test_the_folder_is_a_model_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.random_model.SHARD", 2**19)
    write_model(tmp_path / "m", SMALL, torch.device("cpu"))
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    model, tokenizer = load_model(str(tmp_path / "m"), torch.device("cpu"), "auto"), load_tokenizer(str(tmp_path / "m"))
    assert model.dtype == torch.bfloat16 and model.num_parameters() == parameters(SMALL)
    assert len(tokenizer) == SMALL.vocabulary and model.config.eos_token_id == tokenizer.eos_token_id
    spread = float(model.get_output_embeddings().weight.detach().float().std())
    assert 0.015 < spread < 0.025 and bool((model.base_model.norm.weight == 1).all())
    index = tmp_path / "m" / "model.safetensors.index.json"
    before = index.stat().st_mtime_ns
    write_model(tmp_path / "m", SMALL, torch.device("cpu"))
    assert index.stat().st_mtime_ns == before


def test_whatever_is_sampled_has_a_text_and_a_letter_is_a_token() -> None:
    tokenizer = byte_tokenizer(512)
    text = "So the overall score is 4\n"
    assert len(tokenizer.encode(text)) == len(text) and tokenizer.decode(tokenizer.encode(text)) == text
    assert all(tokenizer.decode([i]) for i in range(512))


def test_the_plan_of_the_large_step_fits_80_gib(tmp_path: Path) -> None:
    """In the order of what configs/qwen3-8b-lora-80gb.yaml has in its header."""
    sizes = ModelSizes.read(known_models()["Qwen/Qwen3-8B"]["sizes"])
    batch = {"tokens": 17_376, "rows": 8_224}
    for engine, beside in (("vllm", 3.0), ("transformers", 2.0)):
        config = run_config(tmp_path, LARGE, engine, torch.device("cuda"))
        found = {k: v / GIB for k, v in planned(config, sizes, (2000, 292), batch, 79 * GIB).items()}
        assert set(found) == set(PEAKS)
        assert 28 < found["trainer_update"] < 36 and found["beside_update"] == pytest.approx(beside)
        assert found["card_update"] == pytest.approx(found["trainer_update"] + beside)
        assert found["card_rollouts"] < 75


@NEEDS_PEFT
def test_without_vllm_transformers_samples_and_peaks_stand_beside_the_plan(
    results: Path, without_vllm: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor with what a machine with a GPU may lack."""
    lacking = results / "lacking"
    for name in ("jsonargparse", "docstring_parser", "gguf", "trl", "datasets"):
        (lacking / name).mkdir(parents=True)
        (lacking / name / "__init__.py").write_text(f"raise ModuleNotFoundError('No module named {name}')")
    monkeypatch.setenv("PYTHONPATH", f"{lacking}{os.pathsep}{os.environ['PYTHONPATH']}")
    assert lora_step.run(results, small=True, seconds=500) == 0
    said = capsys.readouterr().out
    assert "vLLM asleep is left out, vllm is not installed here; Transformers samples" in said
    assert "LoRA step, random tiny, rollouts by Transformers, K=3 P=900 R=44 prompts=2" in said
    assert "seconds of update 2: sync" in said and "measured" in said and "failed" not in said
    assert all(f"  {text}" in said for text in PEAKS.values())
    facts = [json.loads(line) for line in (results / "lora-step.jsonl").read_text().splitlines()]
    assert [fact["step"] for fact in facts if fact["what"] == "update"] == [1, 2] and facts[-1]["what"] == "done"
    values = lines_of(results)
    assert all(variant == "transformers" for variant, _ in values.values())
    for name in PEAKS:
        if name != "engine":  # it has none of its own
            assert values[f"{name}_bytes"][1] > 0 and values[f"{name}_planned_bytes"][1] > 0
    assert values["trainer_update_bytes"][1] < values["card_update_bytes"][1]
    assert {"seconds", "seconds/rollout", "seconds/update", "seconds/sync", "logprob_difference"} <= set(values)
    [row] = report.summarize(record.read(results / "benchmarks.csv"))["lora_steps"]
    assert row["engine"] == "transformers"
    measured, planned = values["card_update_bytes"][1], values["card_update_planned_bytes"][1]
    assert row["card_update_over_plan"] == pytest.approx(measured / planned)
    text = (results / "lora-step.txt").read_text()
    assert "vLLM" not in text and "wrote " in text


@NEEDS_PEFT
@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_itself_samples(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lora_step.run(results, small=True, seconds=600) == 0
    said = capsys.readouterr().out
    assert "LoRA step, random tiny, vLLM awake in the update" in said  # a CPU's does not sleep
    assert "engine and trainer differ by" in said and "failed" not in said
    values = lines_of(results)
    assert all(variant == "vllm" for variant, _ in values.values())
    assert values["engine_bytes"][1] > 0 and values["logprob_difference"][1] < 1e-3


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("os.abort()", "ended by SIGABRT"),
        ("raise SystemExit(3)", "ended with status 3"),
        ("os._exit(0)", "ended without a word"),
        ("time.sleep(60)", "not done in 2 s"),
    ],
)
def test_an_end_of_the_process_is_told_with_what_it_did(
    results: Path, without_vllm: None, monkeypatch: pytest.MonkeyPatch, capsys: Any, code: str, words: str
) -> None:
    monkeypatch.setattr(lora_step, "command", ends_by(code))
    assert lora_step.run(results, small=True, seconds=2) == 1
    assert f"LoRA step with transformers failed in 'update 1: rollouts': {words}" in capsys.readouterr().out
    assert not (results / "benchmarks.csv").exists()


def test_what_was_measured_before_the_end_is_kept() -> None:
    update = {
        "what": "update", "step": 1, "engine": "vllm", "asleep": True, "case": "K=8", "gap": 0.01, "room": 80 * GIB,
        "seconds": {"step_time": 9.0, "rollout": 5.0}, "bytes": {"trainer_update": [3 * GIB, 2 * GIB]},
    }  # fmt: skip
    error = {"what": "error", "phase": "update 2: rollouts", "error": "OutOfMemoryError: ...", "card": "79.0 of 79.1"}
    text = "\n".join(lora_step.text([update, error], "vllm", small=False))
    assert "random Qwen3-8B, vLLM asleep in the update" in text and "3.00     2.00   1.50" in text
    assert "failed in 'update 2: rollouts': OutOfMemoryError: ... (79.0 of 79.1)" in text


def test_the_highest_peak_counts_with_its_own_plan() -> None:
    facts = [{"bytes": {"a": [5, 6], "b": [None, 1], "c": [-9, 1]}}, {"bytes": {"a": [7, 8]}}, {"bytes": {"a": [6, 9]}}]
    assert lora_step.peaks([*facts, {}]) == {"a": (7, 8), "c": (-9, 1)}


def test_what_a_crashed_process_started_ends_with_it(
    results: Path, without_vllm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = results / "pid"
    start = "import subprocess; p = subprocess.Popen(['sleep', '60'])"
    code = f"{start}; open({str(pid)!r}, 'w').write(str(p.pid)); os.abort()"
    monkeypatch.setattr(lora_step, "command", ends_by(code))
    assert lora_step.run(results, small=True, seconds=30) == 1
    state = Path(f"/proc/{pid.read_text()}/stat")
    end = time.monotonic() + 10  # it was killed, and dies when it is next looked at
    while (alive := state.exists() and state.read_text().split()[2] != "Z") and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive


def test_where_vllm_fails_transformers_is_tried(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lora_step, "VLLM", "json")
    monkeypatch.setattr(lora_step, "command", ends_by("os.abort()"))
    assert lora_step.run(results, small=True, seconds=lora_step.LEAST + 60) == 1
    said = capsys.readouterr().out
    assert said.index("LoRA step with vllm failed") < said.index("LoRA step with transformers failed")


def test_a_missing_package_is_named(results: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(lora_step, "NEEDED", ("json", "a_package_that_is_nowhere"))
    assert lora_step.run(results, small=True) == 0
    assert "LoRA step left out: not installed here: a_package_that_is_nowhere" in capsys.readouterr().out


def test_without_room_for_the_model_the_error_says_how_much(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lora_step.tempfile, "gettempdir", lambda: str(tmp_path))
    assert lora_step.room_for(1) in (Path("/dev/shm"), tmp_path)
    monkeypatch.setattr(lora_step, "_available", lambda: 0)
    assert lora_step.room_for(1) == tmp_path
    with pytest.raises(OSError, match=r"a model of 1073741824 GiB has room neither in /dev/shm .* set TMPDIR"):
        lora_step.room_for(2**60)


def test_gpu_check_goes_on_behind_a_crash(
    results: Path, without_vllm: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the step stands between ours and the peers."""
    done: list[str] = []
    found = order.stages()

    def noted(stage: stages.Stage) -> stages.Stage:
        def work(check: stages.Check, end: float) -> int:
            done.append(stage.name)
            return stage.work(check, end) if stage.name == "LoRA step" else 0

        return stage._replace(work=work)

    monkeypatch.setattr(lora_step, "command", ends_by("os.abort()"))
    monkeypatch.setattr(order, "stages", lambda: tuple(map(noted, found)))
    monkeypatch.setenv("REAL_FAST_RESULTS", str(results))
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(results), "--small", "--no-tests"])
    assert gpu_check.main() == 1
    assert done == [stage.name for stage in found if stage.name != "tests"]
    assert done.index("updates") < done.index("LoRA step") < done.index("head, peers")
    out = capsys.readouterr().out
    assert "failed in 'update 1: rollouts': ended by SIGABRT" in out and "something went wrong in: LoRA step\n" in out
    with tarfile.open(results / "gpu-check.tar.gz") as archive:
        assert {"lora-step.txt", "lora-step.jsonl"} <= set(archive.getnames())
