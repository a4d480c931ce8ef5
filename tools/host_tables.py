"""Tables of the host's time in an update: measured part by part, and beside what the planner expects of cards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.report import parameters
from real_fast.planning.plan import make_plan
from tools.plan_headers import planned

Line = dict[str, Any]


def tables(configs: Path, results: Path) -> dict[str, str]:
    """The tables by their markers' names."""
    file = results / "host_time.json"
    lines: list[Line] = json.loads(file.read_text("utf-8")) if file.is_file() else []
    return {"host-time": time_table(lines), "host-cards": card_table(configs, lines)}


def time_table(lines: list[Line]) -> str:
    """Milliseconds of each part, a column for each name; the first part is the engine's."""
    if not lines:
        return "No measurement is kept yet."
    where = "; ".join(dict.fromkeys(f"{line['case']}; {line['machine']}" for line in lines))
    engine, *parts = lines[-1]["parts"]
    own = {line["name"]: sum(line["parts"].get(part, 0.0) for part in parts) for line in lines}

    def row(name: str, values: list[float]) -> str:
        return f"| {name} | {' | '.join(f'{value:.0f}' for value in values)} |"

    out = [f"{where}:\n", f"| milliseconds | {' | '.join(own)} |", "|---" * (1 + len(lines)) + "|"]
    out += [row(part, [line["parts"].get(part, 0.0) for line in lines]) for part in (engine, *parts)]
    out.append(row("all, but what the engine does", list(own.values())))
    out.append(row("all", [sum(line["parts"].values()) for line in lines]))
    return "\n".join(out)


def card_table(configs: Path, lines: list[Line]) -> str:
    """What the planner expects of an update of as many prompts and rollouts, by configuration that has a plan."""
    if not lines:
        return "No measurement is kept yet."
    measured, size = sum(lines[-1]["parts"].values()) / 1e3, parameters(lines[-1]["case"])
    prompts, k, p, r = (int(size[name]) for name in ("prompts", "K", "P", "R"))
    out = ["| configuration | cards | planned: forward and backward, s | rollouts, s | all, s | the host's share |"]
    out.append("|---" * 6 + "|")
    for path, config in planned(configs):
        rollout = replace(config.rollout, prompts_per_step=prompts, group_size=k)
        s = make_plan(replace(config, rollout=rollout, prompt_tokens=p, response_tokens=r)).seconds
        cells = [f"[{path.stem}](/configs/{path.name})", f"{config.gpus} {config.card}"]
        cells += [f"{s.update:.0f}", f"{s.rollouts:.0f}", f"{s.total:.0f}", f"{measured / s.total:.2%}"]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)
