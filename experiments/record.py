"""What a finished run leaves: one small file of its predictions, settings and cost, from which other machines go on.

RESULTS/runs/METHOD-SEED.json.gz has no text of the rows. With the same data files beside it, every table is made anew.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

from experiments import data
from experiments.settings import Experiment, run_folder
from real_fast.errors import OutputError
from real_fast.utils.files import replacing
from real_fast.utils.jsonio import clean, read_jsonl

# Of a row: prediction, then the probability of each score; None where there is no score.
Predicted = list[float | None]
_TRAINING = ("rollout", "update", "optimizer", "sync", "self_generated")
# Of metrics.jsonl, to say how far a method could learn: means over the updates.
_HEALTH = {"zero_spread": "frac_reward_zero_std", "score_entropy": "score/entropy"}


def file_of(results: Path, method: str, seed: int) -> Path:
    """The file of a finished run."""
    return results / "runs" / f"{method}-{seed}.json.gz"


def settings_of(experiment: Experiment, method: str, seed: int) -> dict[str, Any]:
    """Settings of a run and of what it starts from, with paths that are the same everywhere, and the template."""
    model = {"model": experiment.common["model"]}
    chain = {name: experiment.config(name, seed, Path()) | model for name in [method, *experiment.starts(method)]}
    return {"runs": chain, "feedbacks": experiment.feedbacks(method, seed), "template": experiment.template()}


def read(experiment: Experiment, results: Path, rows: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Every finished run of the experiment.

    Args:
        experiment: The experiment.
        results: Where the files are.
        rows: The folder of the prepared rows.

    Raises:
        OutputError: A run was made with other settings or rows, so it must not stand beside the others.
    """
    found = {}
    known = data.fingerprint(rows)
    for method, seed in experiment.order():
        file = file_of(results, method, seed)
        if not file.is_file():
            continue
        run = json.loads(gzip.decompress(file.read_bytes()))
        other = _difference(run["settings"], json.loads(json.dumps(settings_of(experiment, method, seed))))
        if run["data"] != known:
            other = f"other rows (fingerprint {run['data']}, and {rows} has {known})"
        if other:
            raise OutputError(
                f"{file} was made with {other}: runs of two experiments do not mix. Remove that file to make the run "
                "again, take another --results, or give the settings and data files that it was made with"
            )
        found[method, seed] = run
    return found


def write(experiment: Experiment, folder: Path, results: Path, method: str, seed: int) -> Path:
    """Write a run's file out of its folder, once it is trained and graded."""
    run = run_folder(folder, method, seed)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    start = experiment.methods[method].get("init_from")
    made = {
        "method": method,
        "seed": seed,
        "settings": settings_of(experiment, method, seed),
        "data": data.fingerprint(folder / "data"),
        "weights": weights(run / "final"),
        "start_weights": weights(run_folder(folder, start, seed) / "final") if start else None,
        "machine": summary["machine"],
        **_about(folder, run, summary),
        "dev": _predictions(run / "eval" / "after.predictions.jsonl"),
        "test": _predictions(run / "test" / "predictions.jsonl"),
        "averaged": {
            str(n): _predictions(run / f"averaged-{n}" / "predictions.jsonl")
            for n in experiment.feedbacks(method, seed)
        },
    }
    file = file_of(results, method, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        # Without the time, so that the same numbers are the same file.
        temporary.write_bytes(gzip.compress(json.dumps(clean(made), separators=(",", ":")).encode(), mtime=0))
    return file


def weights(folder: Path) -> str:
    """What tells one model from another: a hash of its weights."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:12]


def cpu_file(folder: Path, method: str, seed: int) -> Path:
    """CPU-seconds of a run's processes, a line each: {"part": "train" or what was graded, "cpu", "wall"}."""
    return folder / "logs" / f"{method}-{seed}.cpu.jsonl"


def _predictions(file: Path) -> dict[str, dict[str, Predicted]]:
    """By benchmark and row."""
    found: dict[str, dict[str, Predicted]] = {}
    for row in read_jsonl(file):
        scores = list((row["distribution"] or {}).values())
        values = [None if v is None else round(v, 4) for v in [row["prediction"], *scores]]
        found.setdefault(row["benchmark"], {})[row["id"]] = values
    return found


def _about(folder: Path, run: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """What a run saw and took, TRACT's first stage included; the run that it starts from is not."""
    stages = [stage for stage in (run / "stage1", run) if (stage / "summary.json").is_file()]
    summaries = [json.loads((stage / "summary.json").read_text(encoding="utf-8")) for stage in stages]
    updates = [m for m in read_jsonl(run / "metrics.jsonl") if m["phase"] == summary["method"]]
    training = sum(_training_seconds(s) for s in summaries)
    spent = read_jsonl(cpu_file(folder, *_name(run)))
    mine = [part for part in spent if part["part"] == "train"]
    # A process' CPU time, so that what else the machine does counts little; its evaluations and start are taken out by
    # their share of the time on the clock.
    rate = sum(p["cpu"] for p in mine) / max(sum(p["wall"] for p in mine), 1e-9)
    curve, before = [], {"step": 0, "rows": 0, "tokens": 0, "cpu": 0.0}
    for stage, s in zip(stages, summaries, strict=True):
        curve += _curve(stage, s, before, rate)
        before = {
            "step": before["step"] + s["steps"],
            "rows": before["rows"] + _rows_seen(stage, s),
            "tokens": before["tokens"] + s["sampled_tokens"],
            "cpu": before["cpu"] + rate * _training_seconds(s),
        }
    after = summary["eval"]["after"]
    return {
        "updates": before["step"],
        "rows_seen": before["rows"],
        "tokens_sampled": before["tokens"],
        "training_seconds": training,
        "training_cpu_seconds": rate * training,
        "grading_cpu_seconds": sum(part["cpu"] for part in spent if part["part"] != "train"),
        "off_scale_mass": after["off_scale_mass"],
        "truncated": after["truncated"],
        "mean_length": after["mean_length"],
        **{name: _over([m.get(key) for m in updates]) for name, key in _HEALTH.items()},
        "kl": [[m["step"], round(m["kl"], 5)] for m in updates if m.get("kl") is not None],
        "curve": curve,
    }


def _curve(stage: Path, summary: dict[str, Any], before: dict[str, Any], rate: float) -> list[dict[str, Any]]:
    """The dev rows' RMSE and correlation after so many updates, with what these had cost by then."""
    found = []
    for line in read_jsonl(stage / "metrics.jsonl"):
        if line["phase"] != "eval":
            continue
        done = line["step"] / summary["steps"] if summary["steps"] else 0.0
        found.append(
            {
                "step": before["step"] + line["step"],
                "rows": before["rows"] + round(done * _rows_seen(stage, summary)),
                "tokens": before["tokens"] + round(done * summary["sampled_tokens"]),
                "cpu": before["cpu"] + done * rate * _training_seconds(summary),
                "rmse": line["eval"]["rmse"],
                "pearson": line["eval"]["pearson"],
            }
        )
    return found


def _training_seconds(summary: dict[str, Any]) -> float:
    return float(sum(s for part, s in summary["seconds"].items() if part in _TRAINING))


def _rows_seen(run: Path, summary: dict[str, Any]) -> int:
    metrics = [m for m in read_jsonl(run / "metrics.jsonl") if m["phase"] == summary["method"]]
    return round(metrics[-1]["epoch"] * summary["train_rows"]) if metrics else 0


def _over(values: list[float | None]) -> float | None:
    """Mean of those that were measured."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _name(run: Path) -> tuple[str, int]:
    method, _, seed = run.name.rpartition("-")
    return method, int(seed)


def _difference(old: Any, new: Any, where: str = "") -> str:
    """The first setting that differs, for a message; empty where none does."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            if found := _difference(old.get(key), new.get(key), f"{where}.{key}" if where else str(key)):
                return found
        return ""
    return "" if old == new else f"other settings ({where.removeprefix('runs.')} was {old!r} and is {new!r})"
