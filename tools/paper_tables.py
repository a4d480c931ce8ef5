"""Tables of experiments/paper.md: a row for each file of configs/paper/, what it takes, and what was published.

What a row needs is the plan's arithmetic. A result is put into experiments/paper/NAME.json, a copy of a run's
eval/after.json or of an evaluation's summary.json, and `make tables` shows it.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from real_fast.config.cli import load, parse
from real_fast.config.commands import COMMANDS, PlanConfig
from real_fast.planning.need import PHRASE_TOKENS
from real_fast.planning.plan import Plan, make_plan, settled

BENCHMARKS = {"feedback_bench": "FB", "flask": "FLASK", "vicuna_bench": "Vicuna", "mt_bench": "MT"}
# Pearson x 100 on these and their average, as published with the method (arXiv 2603.17145).
PUBLISHED = {
    "mistral-7b-raft": (87.9, 41.8, 52.8, 39.9, 55.6),
    "mistral-7b-tract": (93.9, 50.7, 56.2, 52.1, 63.2),
    "mistral-7b-binary-rl": (93.7, 51.6, 58.0, 52.9, 64.1),
    "mistral-7b-real": (93.2, 56.0, 63.3, 59.3, 67.9),
    "qwen3-32b-base": (63.4, 54.3, 50.8, 42.5, 52.7),
    "qwen3-32b-raft": (85.4, 52.1, 51.9, 61.1, 62.6),
    "qwen3-32b-real": (91.1, 58.9, 65.1, 68.9, 71.0),
}
# Both rewards are readings of the one published row.
PUBLISHED |= {name + "-authors": PUBLISHED[name] for name in ("mistral-7b-real", "qwen3-32b-real")}
ROWS = 99_952  # of Feedback-Collection
_AT_A_TIME = 32  # rows whose feedback TRACT's first model writes in one call
_BASE = "qwen3-32b-base"
_METHODS = ("raft", "tract", "binary-rl", "real")


def tables(configs: Path, results: Path) -> dict[str, str]:
    """The tables by their markers' names, from the files of `configs` and the results that are kept."""
    files = rows(configs)
    return {"paper-rows": table(files, results), "paper-commands": commands(files)}


def rows(configs: Path) -> list[Path]:
    """The files in the order of the table: by model, then method, an ablation behind what it is one of."""

    def place(path: Path) -> tuple[bool, str, int, str]:
        model, method = _split(path.stem)
        ablation = method not in (*_METHODS, "real-authors")
        return ablation, model, max(n for n, m in enumerate(_METHODS) if method.startswith(m)), method

    return sorted(configs.glob("*.yaml"), key=place)


def gpus(name: str) -> int:
    """H100s that a row is planned on: machines of 8, two of them for all weights of 32B."""
    return 16 if "32b" in name and not name.endswith(("raft", "tract")) else 8


def planned(path: Path) -> tuple[PlanConfig, Plan]:
    """What is planned of a row, and its plan."""
    flags = ["--config", str(path), "--card", "h100", "--gpus", str(gpus(path.stem))]
    config: PlanConfig = parse(COMMANDS["plan"], "real-fast plan", flags)
    if config.method in ("raft", "tract"):  # a row has one answer, and raft's is the phrase and the score
        given = replace(config.rollout, group_size=1, prompts_per_step=config.supervised.prompts_per_step)
        short = PHRASE_TOKENS + 1 if config.supervised.feedback == "none" else 0
        config = replace(config, rollout=given, response_tokens=short)
    config = settled(config)
    return config, make_plan(config)


def hours(config: PlanConfig, plan: Plan) -> float:
    """Of the updates; TRACT's are those of two stages, and the first writes the feedback of the second."""
    total = config.train.steps * plan.seconds.total
    if config.method == "tract":
        writes = replace(config, method="real", rollout=replace(config.rollout, prompts_per_step=_AT_A_TIME))
        total = 2 * total + math.ceil(ROWS / _AT_A_TIME) * make_plan(writes).seconds.rollouts
    return total / 3600


def table(files: list[Path], results: Path) -> str:
    """What each row takes and gives; the untrained 32B model stands in front of the rows that are trained from it."""
    names = " / ".join([*BENCHMARKS.values(), "average"])
    out = [f"| row | GPUs | hours | published: {names} | measured: {names} |", "|---" * 5 + "|"]
    # Hours, by what they depend on: an ablation of the reward takes the same.
    known: dict[tuple[str, str, int], str] = {}
    for path in files:
        name, config = path.stem, load(path)
        if name == "qwen3-32b-raft":
            out.append(f"| base: qwen3-32b, not trained | | | {_published(_BASE)} | {_measured(results, _BASE)} |")
        work = config.model, config.method, config.rollout.group_size
        if work not in known:
            known[work] = f"{hours(*planned(path)):.0f}"
        cells = [f"[{name}](/configs/paper/{path.name})", str(gpus(name)), known[work]]
        out.append(f"| {' | '.join(cells)} | {_published(name)} | {_measured(results, name)} |")
    return "\n".join(out)


def commands(files: list[Path]) -> str:
    """One command a row, each behind those that it starts from."""
    lines = []
    for path in files:
        nodes = ""
        if gpus(path.stem) > 8:
            nodes = "--nnodes 2 --rdzv-backend c10d --rdzv-id 32b --rdzv-endpoint FIRST_MACHINE:29500 "
        run = f"--config configs/paper/{path.name} --output runs/paper/{path.stem}"
        lines.append(f"torchrun {nodes}--nproc-per-node 8 -m real_fast.train {run}")
    return "\n".join(["```", *lines, "```"])


def _published(name: str) -> str:
    return " / ".join(f"{r:.1f}" for r in PUBLISHED.get(name, ()))


def _measured(results: Path, name: str) -> str:
    """Of a kept result; nothing without one."""
    file = results / f"{name}.json"
    if not file.is_file():
        return ""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    values = [found["benchmarks"][b]["pearson"] for b in BENCHMARKS] + [found["pearson"]]
    return " / ".join("-" if r is None else f"{100 * r:.1f}" for r in values)


def _split(name: str) -> tuple[str, str]:
    """A row's model, and the rest of its name."""
    family, size, method = name.split("-", 2)
    return f"{family}-{size}", method
