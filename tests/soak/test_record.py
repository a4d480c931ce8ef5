"""The soak's own bookkeeping: what a part finds is kept in its section, and a loss is an exit status."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.soak import __main__ as soak
from tests.soak import suites
from tests.soak.memory import ALLOWED, growth, not_flat
from tests.soak.record import Found, by_kind
from tools.reliability_tables import faults_table, summary_table


def part(monkeypatch: pytest.MonkeyPatch, name: str, found: Found) -> None:
    module = ModuleType(f"tests.soak.{name}")
    module.run = lambda folder, share: found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"tests.soak.{name}", module)


def test_a_part_keeps_the_sections_of_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "reliability.json"
    part(monkeypatch, "kills", Found(by_kind([("killed", None), ("killed", None)]), {"kills a minute": 3}))
    part(monkeypatch, "disk", Found(by_kind([("full", None), ("full", "step-000002 | lost")]), notes=["No cc."]))
    assert soak.main(["kills", "--output", str(output)]) == 0
    assert soak.main(["disk", "--share", "0.5", "--output", str(output)]) == 1
    parts = json.loads(output.read_text("utf-8"))["parts"]
    assert parts["kills"]["faults"] == [{"kind": "killed", "injected": 2, "survived": 2, "lost": []}]
    assert parts["disk"]["share"] == 0.5 and parts["disk"]["machine"] and parts["kills"]["figures"]
    assert "| all | 4 | 3 | 1 |" in summary_table(parts) and "- No cc." in summary_table(parts)
    assert "| disk | full | 2 | 1 | step-000002 \\| lost |" in faults_table(parts)


def test_a_part_that_fails_or_injects_nothing_is_no_success(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "reliability.json"

    def fail(folder: Path, share: float) -> Found:
        raise RuntimeError("the service did not start")

    part(monkeypatch, "service", Found())
    monkeypatch.setattr(sys.modules["tests.soak.service"], "run", fail)
    part(monkeypatch, "long", Found(by_kind([("long run", None)])))
    assert soak.main(["service", "long", "--output", str(output)]) == 1
    parts = json.loads(output.read_text("utf-8"))["parts"]
    assert parts["service"]["faults"][0]["lost"] == ["RuntimeError: the service did not start"]
    assert parts["long"]["faults"][0]["survived"] == 1
    part(monkeypatch, "fuzz", Found(notes=["not run: no wheel"]))
    assert soak.main(["fuzz", "--output", str(output)]) == 1
    assert "nothing was injected:\n    not run: no wheel" in capsys.readouterr().out


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        soak.main(["kils"])
    assert "no part is called 'kils'; there are suites, kills" in capsys.readouterr().err


def test_cases_of_a_suite_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "test_few.py"
    file.write_text(
        "import pytest\n@pytest.mark.parametrize('n', [1, 2, 3])\ndef test_small_numbers(n):\n    assert n < 3\n"
        "def test_left_out():\n    pytest.skip('no card')\n"
    )
    monkeypatch.setattr(suites, "SUITES", {"few": [str(file)]})
    found = suites.run(tmp_path, 1.0)
    (fault,) = found.faults
    assert (fault.kind, fault.injected, fault.survived) == ("few: small numbers", 3, 2)
    assert fault.lost[0].startswith("test_small_numbers[3]: ") and found.notes == ["few: left out: not run (no card)"]


def test_a_suite_without_cases_is_no_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(suites, "SUITES", {"few": [str(tmp_path / "test_gone.py")]})
    with pytest.raises(RuntimeError, match="ended with status 4"):
        suites.run(tmp_path, 1.0)


def test_memory_that_grows_is_found() -> None:
    flat = [(float(i), 500 * 2**20 + (i % 3) * 2**20) for i in range(40)]
    assert not_flat("it", flat) is None
    leak = [(second, size + int(second) * ALLOWED // 10) for second, size in flat]
    assert growth(leak) > ALLOWED and str(not_flat("it", leak)).startswith("it grew by ")
    with pytest.raises(ValueError, match="3 samples are too few"):
        growth(flat[:3])
