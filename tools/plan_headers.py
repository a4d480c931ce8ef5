"""The plans in the headers of configs/: what ``real-fast plan`` prints, behind the line that says how it was called."""

from __future__ import annotations

import re
from pathlib import Path

from real_fast.config.cli import parse
from real_fast.config.commands import COMMANDS, PlanConfig
from real_fast.planning.need import GIB, training_of
from real_fast.planning.plan import make_plan, settled
from real_fast.planning.report import report

_PLAN = re.compile(r"^# (real-fast plan (--.*))\n(?:#.*\n)*", re.M)


def planned(configs: Path) -> list[tuple[Path, PlanConfig]]:
    """The configurations whose header has a plan, by their names, and what is planned."""
    found = [(path, _PLAN.search(path.read_text(encoding="utf-8"))) for path in sorted(configs.glob("*.yaml"))]
    return [(path, _config(called[2])) for path, called in found if called is not None]


def table(configs: Path) -> str:
    """A line for each configuration for one GPU with a plan: its card, what is trained, memory and hours."""
    out = ["| card | configuration | trains | GiB: update, sampling | seconds an update | updates, hours | install |"]
    out.append("|---" * 7 + "|")
    for path, config in planned(configs):
        if config.gpus > 1:
            continue
        text = path.read_text(encoding="utf-8")
        plan, t, steps = make_plan(config), training_of(config), config.train.steps
        optimiser = t.optimizer + (f", {t.offload} on the host" if t.offload != "none" else "")
        trains = f"adapters of rank {t.rank}" + ", the rest in nf4" * t.nf4 if t.rank else f"all weights, {optimiser}"
        [install] = re.findall(r"^# (pip install .*)$", text, re.M)
        cells = [f"{config.gpu_memory:g} GB ({config.card})", f"[{path.stem}](/configs/{path.name})"]
        cells += [
            f"{config.model.split('/')[1]}: {trains}",
            f"{plan.need.update / GIB:.0f}, {plan.need.rollouts / GIB:.0f}",
            f"{plan.seconds.total:.0f}",
        ]
        cells += [f"{steps}, {steps * plan.seconds.total / 3600:.0f}", f"`{install}`"]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def _config(arguments: str) -> PlanConfig:
    config: PlanConfig = settled(parse(COMMANDS["plan"], "real-fast plan", arguments.split()))
    return config


def with_plan(text: str) -> str:
    """A configuration's text with its plan as it is now; one that calls no plan stays as it is."""
    called = _PLAN.search(text)
    if called is None:
        return text
    config = _config(called[2])
    lines = [f"# {line}".rstrip() for line in report(config, make_plan(config)).splitlines()]
    return _PLAN.sub(lambda _: "\n".join([f"# {called[1]}", "#", *lines, ""]), text, count=1)


def write(configs: Path) -> list[Path]:
    """Write the plans into the headers; returns the files that changed."""
    changed = []
    for path in sorted(configs.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        if (new := with_plan(text)) != text:
            path.write_text(new, encoding="utf-8")
            changed.append(path)
    return changed
