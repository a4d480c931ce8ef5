"""The benchmark of the host's time, on an update of two prompts."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import host_time
from benchmarks.host_time import PARTS, Stopwatch, measure
from tools.host_tables import time_table


def test_every_part_of_the_trainers_step_is_seen(monkeypatch, tmp_path: Path) -> None:
    found = measure(prompts=2, k=2, p=6, r=40, steps=1)
    assert tuple(found) == PARTS and all(milliseconds > 0 for milliseconds in found.values())
    monkeypatch.setattr(host_time, "FILE", tmp_path / "host_time.json")
    monkeypatch.setattr(host_time, "measure", lambda: found)
    for name in ("before", "as it is", "before"):  # a name's last measurement is kept
        host_time.main([name])
    lines = json.loads(host_time.FILE.read_text("utf-8"))
    assert [line["name"] for line in lines] == ["as it is", "before"]
    assert f"| all | {sum(found.values()):.0f} |" in time_table(lines)


def test_an_inner_part_is_not_the_outer_ones(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(host_time.time, "process_time", lambda: now[0])
    clock = Stopwatch()
    with clock("outer"):
        now[0] = 1.0
        with clock("inner"):
            now[0] = 4.0
        now[0] = 9.0
    assert clock.seconds == {"outer": 6.0, "inner": 3.0}
