"""Tables of several GPUs: the plans of the configurations that are for some, and what was measured on CPU ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from real_fast.config.commands import PlanConfig
from real_fast.planning.cards import COMPUTE
from real_fast.planning.need import GIB, lengths
from real_fast.planning.plan import Plan, make_plan
from real_fast.planning.ranks import Ranks
from real_fast.planning.spread import Spread
from tools.plan_headers import planned

# Of the authors' code an update takes about so many times a forward pass, as read from its source.
AUTHORS_PASSES = 16
# Gbit/s a GPU of machines that share a port of 100 among eight.
SLOW = 12.5


def tables(configs: Path, results: Path) -> dict[str, str]:
    """The tables by their markers' names."""
    found = sorted(((path, c) for path, c in planned(configs) if c.gpus > 1), key=lambda one: one[1].gpus)
    return {
        "scaling-plan": plan_table(found),
        "scaling-efficiency": "\n\n".join(efficiency_table(config) for _, config in found),
        "scaling-measured": measured_table(_read(results / "scaling.json")),
        "scaling-same": same_table(_read(results / "same_run.json")),
        "ahead-seeds": ahead_table(_read(results / "ahead_seeds.json")),
    }


def _read(file: Path) -> dict[str, Any] | None:
    found: dict[str, Any] | None = json.loads(file.read_text("utf-8")) if file.is_file() else None
    return found


def plan_table(found: list[tuple[Path, PlanConfig]]) -> str:
    """A column for each configuration: memory, seconds, and work beside the other implementations'."""
    plans = [(path, config, make_plan(config)) for path, config in found]
    rows: dict[str, list[str]] = {}

    def row(name: str, *cells: str) -> None:
        rows.setdefault(name, []).extend(cells)

    for path, config, plan in plans:
        ranks, s, n = Ranks.of(config), plan.seconds, plan.need
        row("configuration", f"[{path.stem}](/configs/{path.name})")
        row("GPUs", f"{ranks.gpus} {config.card} of {config.gpu_memory:g} GB, {ranks.nodes} × {ranks.per_node}")
        row("one copy of the model over; engines", f"{ranks.shards}; {ranks.engines} of {ranks.tensor_parallel}")
        row("GiB a GPU: update, sampling", f"{n.update / GIB:.0f}, {n.rollouts / GIB:.0f}")
        row("seconds an update", f"{s.total:.0f}")
        row("… forward and backward", f"{s.update:.0f}")
        row("… waiting for other GPUs", f"{s.waiting:.1f}")
        row("… rollouts", f"{s.rollouts:.0f}")
        row("… new weights to the engines", f"{s.sync:.1f}")
        row(f"{config.train.steps} updates, hours", f"{config.train.steps * s.total / 3600:.0f}")
        rate = COMPUTE * plan.card.flops * config.gpus
        for name, flops in (
            ("real-fast", plan.flops.ours),
            ("reference-style", plan.flops.reference),
            ("the authors' code", AUTHORS_PASSES * forward(config, plan)),
        ):
            row(f"PFLOP an update, and seconds at the same rate: {name}", f"{flops / 1e15:,.0f}, {flops / rate:,.0f}")
    models = [config.model.rpartition("/")[2] for _, config, _ in plans]
    lines = [f"| | {' | '.join(models)} |", "|---" * (1 + len(models)) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def forward(config: PlanConfig, plan: Plan) -> float:
    """Operations of one forward pass over every rollout with its own prompt, whole logits included."""
    (p, r), rollouts = lengths(config), config.rollout.prompts_per_step * config.rollout.group_size
    tokens = p + r - 1
    return rollouts * (plan.shape.flops.forward([(tokens, 0)]) + 2.0 * plan.shape.flops.head * tokens)


def efficiency_table(config: PlanConfig) -> str:
    """A line per number of GPUs: seconds by part with one copy of the model and with several, on two networks."""
    fast, slow = make_plan(config), make_plan(replace(config, network=SLOW))
    few = config.gpus // config.train.replicas
    gigabits = f"{fast.card.network * 8e-9:.0f}"
    out = [
        f"{config.model.rpartition('/')[2]}, {config.card}, {config.rollout.prompts_per_step} prompts × "
        f"{config.rollout.group_size} an update:\n",
        "| GPUs | prompts a GPU | forward and backward | rollouts | a copy of the model over | waiting, new weights "
        f"({gigabits} Gbit/s a GPU) | seconds an update | computing | efficiency | waiting, new weights ({SLOW:g} "
        "Gbit/s) | computing | efficiency |",
        "|---" * 12 + "|",
    ]
    for a, b in zip(fast.spread, slow.spread, strict=True):
        s, ranks = a.seconds, Ranks.of(a.config)
        over = "all" if ranks.shards == ranks.gpus else f"{few}"
        cells = [f"{ranks.gpus}", f"{ranks.of_rank(a.config.rollout.prompts_per_step)}", f"{s.update:.0f}"]
        cells += [f"{s.rollouts:.0f}", over, *_linked(a)]
        cells.insert(6, f"{s.total:.0f}")
        cells += _linked(b)
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def _linked(point: Spread) -> list[str]:
    """Seconds for other GPUs, the share of an update's passes that is computing, and efficiency."""
    s = point.seconds
    computing = s.update / (s.update + s.waiting)
    return [f"{s.waiting:.1f}, {s.sync:.1f}", f"{computing:.0%}", f"{point.efficiency:.0%}"]


def measured_table(report: dict[str, Any] | None) -> str:
    """A line per model and number of CPU ranks, with the speed over that of one."""
    if report is None:
        return "No measurement is kept yet: `python -m benchmarks.scaling` writes one."
    where = report["machine"]
    out = [
        f"Mean of {report['updates']} updates, {where['cores']} cores, a thread a rank; {where['machine']}; "
        f"{where['versions']}:\n",
        "| model | ranks | seconds a step | update | rollouts | tokens/s in the update | over one rank | peak a rank |",
        "|---" * 8 + "|",
    ]
    for line in report["cases"]:
        one = next((x for x in report["cases"] if x["model"] == line["model"] and x["ranks"] == 1), None)
        gain = f"{line['tokens_per_second'] / one['tokens_per_second']:.2f} ×" if one and one is not line else ""
        cells = [line["model"], f"{line['ranks']}", *(f"{line[key]:.2f}" for key in ("step", "update", "rollout"))]
        cells += [f"{line['tokens_per_second']:.0f}", gain, f"{max(line['peaks']) / GIB:.2f} GiB"]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def same_table(report: dict[str, Any] | None) -> str:
    """A line per number of ranks: what one run came to, and how far it is from the first line's."""
    if report is None:
        return "No measurement is kept yet: `python -m benchmarks.same_run` writes one."
    out = [
        f"{Path(report['config']).stem}, {report['settings']['train.precision']}, "
        f"{report['runs'][0]['updates']} updates; {report['machine'].partition(',')[0]}; {report['versions']}:\n",
        "| ranks | Pearson before | after warm-up | after REAL | RMSE before | after warm-up | after REAL "
        "| rollouts with the same text | held-out predictions differ by at most |",
        "|---" * 9 + "|",
    ]
    for run in report["runs"]:
        cells = [f"{run['ranks']}"]
        cells += [_interval(run["eval"][name]["pearson"]) for name in ("before", "warmup", "after")]
        cells += [f"{run['eval'][name]['rmse'][0]:.3f}" for name in ("before", "warmup", "after")]
        if "rollouts" in run:
            cells += [f"{run['same_texts']} of {run['rollouts']}", f"{max(run['largest_difference'].values()):.1g}"]
        else:
            cells += ["", ""]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def _interval(found: list[float]) -> str:
    return f"{found[0]:.3f} [{found[1]:.2f}, {found[2]:.2f}]"


LAST = 5  # updates, over which the end of a curve is averaged


def ahead_table(report: dict[str, Any] | None) -> str:
    """A line per seed: where a run in turn and one with rollouts ahead end."""
    if report is None:
        return "No measurement is kept yet: `python -m benchmarks.overlap` writes one."
    runs = {(run["seed"], run["ahead"]): run for run in report["runs"]}
    out = [
        f"{report['runs'][0]['updates']} updates, rewards are means of the last {LAST}; "
        f"{report['machine']}; {report['versions']}:\n",
        "| seed | Pearson after, in turn | ahead | RMSE after, in turn | ahead "
        "| reward, in turn | ahead | weights, ahead |",
        "|---" * 8 + "|",
    ]
    for seed in sorted({seed for seed, ahead in runs if (seed, 1 - ahead) in runs}):
        pair = [runs[seed, 0], runs[seed, 1]]
        cells = [f"{seed}"]
        for key in ("pearson", "rmse"):
            ends = [run["eval"]["after"] for run in pair]
            cells += [_interval([end[key], *end["ci95"][key]]) for end in ends]
        cells += [f"{mean(run['reward'][-LAST:]):.3f}" for run in pair]
        low, high = (
            [x for x in pair[1][f"sampling/importance_sampling_ratio/{end}"] if x is not None] for end in ("min", "max")
        )
        out.append(f"| {' | '.join(cells)} | {min(low):.2f} to {max(high):.2f} |")
    return "\n".join(out)
