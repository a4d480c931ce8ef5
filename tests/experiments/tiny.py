"""A tiny experiment: settings and rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from real_fast.data import synthetic
from real_fast.utils.jsonio import write_jsonl

TINY: dict[str, Any] = {
    "seeds": [0, 1],
    "data": {
        "sources": {
            "seen": {
                "file": "seen.jsonl",
                "train": ["a"],
                "test": ["a", "b"],
                "test_share": 0.4,
                "dev_share": 0.3,
                "test_rows": 20,
                "near": ["response"],
            },
            "new": {"file": "new.jsonl", "test_rows": 9},
        },
        "averaged_rows": 6,
    },
    "reduced": ["Everything."],
    "baseline": "real",
    "common": {
        "model": "m",
        "prompt": {"template": "short", "system": ""},
        "rollout": {"engine": "transformers", "prompts_per_step": 2, "group_size": 2, "max_tokens": 12},
        "supervised": {"prompts_per_step": 2},
        "objective": {"kl_every": 1},
        "train": {"steps": 2, "precision": "fp32"},
        "eval": {"on_start": False, "temperature": 0.0, "bootstrap": 2, "every": 1},
        "save": {"every": 0},
    },
    "methods": {
        "base": {"train": {"steps": 0}},
        "sft": {"method": "sft", "optim": {"lr": 1e-3}, "train_on": ["seen"]},
        "real": {"init_from": "sft"},
    },
    "primary": {"benchmarks": ["seen", "new"], "others": ["sft", "base"], "resamples": 20},
    "questions": {
        name: {"benchmarks": ["seen"], "pairs": [["real", "sft"], ["sft", "base"]]}
        for name in ("label_only", "halves", "remedies", "elsewhere", "one_task", "without_a_model")
    },
    "averaged": {"methods": ["real"], "feedbacks": [1, 2]},
    "search": {"lr": {"real": [1e-6, 1e-5]}, "share": 0.5},
    "reach": [9.0, 0.0],
}


def rows() -> list[dict[str, Any]]:
    """Sixty rows of one file, of two splits, and twenty of another; several raters."""
    made = list(synthetic.generate(*synthetic.SIZES["eval"], seed=0, which="eval"))[:80]
    return [
        {**row, "id": f"{i}", "split": "b" if i % 7 == 0 else "a", "scores": [row["score"], min(5, row["score"] + 1)]}
        for i, row in enumerate(made)
    ]


def write_files(folder: Path) -> Path:
    """The data files in a new folder."""
    folder.mkdir()
    write_jsonl(folder / "seen.jsonl", rows()[:60])
    write_jsonl(folder / "new.jsonl", rows()[60:])
    return folder


def written(path: Path, **change: Any) -> Path:
    """The YAML file, with other values of some of its keys."""
    path.write_text(yaml.safe_dump({**TINY, **change}, sort_keys=False), encoding="utf-8")
    return path
