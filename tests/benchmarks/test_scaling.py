"""The benchmark of CPU ranks, its runs replaced by what they would leave."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import scaling
from tools.scaling_tables import measured_table


def leave(folder: Path, ranks: int) -> None:
    """The metrics of a run whose first update is slow, and the ranks' peaks."""
    (folder / "run").mkdir()
    lines = [{"phase": "warmup"}] + [
        {"phase": "real", "time/update": s, "time/rollout": 2.0, "step_time": s + 3, "body/tokens": 100, "reward": -1.0}
        for s in (90.0, 4.0, 6.0)
    ]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    for rank in range(ranks):
        (folder / f"peak-{rank}").write_text(str(2**30 * (rank + 1)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_case_leaves_out_the_first_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    def run(command: list[str], **_: Any) -> SimpleNamespace:
        leave(tmp_path, ranks)
        launched = "torch.distributed.run" in command
        assert launched == (ranks > 1) and command[command.index("--rank") + 1] == str(tmp_path)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    found = scaling.case("smollm2-135m", ranks, tmp_path)
    assert (found["update"], found["step"], found["tokens_per_second"]) == (5.0, 8.0, 20.0)
    assert found["peaks"] == [2**30, 2**31][:ranks]


def test_a_run_that_fails_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    failed = SimpleNamespace(returncode=2, stderr="real-fast train: error: no such data\n", stdout="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    output = tmp_path / "scaling.json"
    assert scaling.main(["--models", "smollm2-135m", "--ranks", "2", "--output", str(output)]) == 1
    assert (
        "smollm2-135m on 2 ranks ended with status 2:\nreal-fast train: error: no such data" in capsys.readouterr().err
    )
    assert not output.exists()


def test_a_rank_notes_its_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr("real_fast.commands.main", lambda arguments: asked.append(arguments) or 3)
    monkeypatch.setenv("RANK", "1")
    assert scaling.main(["--rank", str(tmp_path), "--model", "x"]) == 3
    assert asked == [["train", "--model", "x"]] and int((tmp_path / "peak-1").read_text()) > 2**24


def test_the_table() -> None:
    line = {"model": "tiny", "step": 3.0, "update": 2.0, "rollout": 1.0, "tokens": 100, "reward": []}
    cases = [
        {**line, "ranks": 1, "tokens_per_second": 50.0, "peaks": [2**30]},
        {**line, "ranks": 2, "tokens_per_second": 80.0, "peaks": [2**29, 2**30]},
    ]
    where = {"cores": "2", "machine": "a CPU", "versions": "torch 2"}
    text = measured_table({"machine": where, "updates": 4, "cases": cases})
    assert "| tiny | 2 | 3.00 | 2.00 | 1.00 | 80 | 1.60 × | 1.00 GiB |" in text and "| 50 |  |" in text
    assert "No measurement is kept yet" in measured_table(None)
