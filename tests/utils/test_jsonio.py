"""JSON files are whole or absent, and never hold NaN."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from real_fast.utils.files import replacing
from real_fast.utils.jsonio import append_jsonl, clean, read_jsonl, write_json, write_jsonl


def test_json_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError):
        write_json(path, {"x": math.nan})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_clean_makes_plain_json() -> None:
    dirty = {"a": math.inf, "b": [np.float32(2), math.nan], "c": np.array([1.0, math.nan]), "d": (True, None, "x")}
    assert clean(dirty) == {"a": None, "b": [2.0, None], "c": [1.0, None], "d": [True, None, "x"]}
    assert math.isinf(dirty["a"])  # type: ignore[arg-type]


def test_jsonl_round_trip_keeps_every_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"t": "line\u2028separator\nŷ"}, {"t": "half a pair \ud83d"}, [1, None]]
    write_jsonl(path, rows[:2])
    append_jsonl(path, rows[2])
    assert read_jsonl(path) == rows
    with path.open("a") as file:
        file.write('{"cut o')
    assert read_jsonl(path) == rows  # a killed writer's last line
    with path.open("a") as file:
        file.write('ff\n{"next": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4"):
        read_jsonl(path)
    with pytest.raises(ValueError):
        append_jsonl(path, {"x": math.inf})


def test_a_last_line_that_is_cut_off_within_a_character_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = '{"t": "ŷ"}\n'.encode()
    path.write_bytes(line + line[:8])
    assert read_jsonl(path) == [{"t": "ŷ"}]
    path.write_bytes(line[:8] + b"\n" + line)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: not valid JSON \(not UTF-8"):
        read_jsonl(path)
