"""How much of a method's gradient is signal: RESULTS/noise.json, by the halves of its loss, where it starts.

python -m experiments.noise --config experiments/cpu.yaml --results experiments --methods real raft

Gradients of so many batches of a method's own size are taken at the weights that it starts from, and nothing is
trained. From them come the length of the true gradient and the gradient noise scale, the number of prompts at which a
batch is half signal, half noise (McCandlish et al., An Empirical Model of Large-Batch Training, arXiv 1812.06162,
equation 2.9 and appendix A.1), with a jackknife over the batches.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.launch import run_all, train_one
from experiments.run import alone_in, opened, parser_of, prepare_data, reported, require_same
from experiments.settings import Experiment, merged
from real_fast.config import Config, cli
from real_fast.errors import ConfigError
from real_fast.methods.base import Method, UpdateCounts
from real_fast.runs.folder import check_writable
from real_fast.training.setup import Parts, build, settled
from real_fast.utils.jsonio import clean, write_json

PROG = "experiments.noise"
# One coordinate in so many is kept of a gradient: enough for its products, and every batch fits. A prime, so that rows
# of a weight, whose lengths are multiples of 64, give other columns each.
_STRIDE = 61
_FEWEST = 3


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 1 if a start failed, 2 for a mistake of the user's, 130 for Ctrl-C."""
    parser = parser_of(PROG, "Measure signal and noise of the gradients.")
    parser.add_argument("--batches", type=int, default=24, help="batches of a method's own size (default: 24)")
    args = parser.parse_args(argv)

    def work(failed: list[str]) -> None:
        experiment, folder = opened(args)
        results = args.results or folder / "results"
        if args.batches < _FEWEST:
            raise ConfigError(f"--batches is {args.batches}: noise is told from signal with {_FEWEST} or more")
        for place in (folder, results):
            check_writable(place)
        methods, seed = args.methods or [experiment.baseline], experiment.seeds[0]
        with alone_in(folder):
            require_same(experiment, folder)
            prepare_data(experiment, args.data.expanduser(), folder)
            starts = list(dict.fromkeys(s for m in methods for s in reversed(experiment.starts(m))))
            runs = [(start, seed) for start in starts]
            run_all(experiment, runs, partial(train_one, experiment, folder), failed, args.jobs)
            file = results / "noise.json"
            known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            for method in [] if failed else methods:
                known[method] = measured(experiment, method, folder, args.batches)
                write_json(file, clean(known))
                for line in known[method]:
                    scale = "unknown" if line["noise_scale"] is None else f"{line['noise_scale']:.0f} prompts"
                    print(f"{method}, {line['part']}: the signal's share {line['signal']:.3f}, noise scale {scale}")

    return reported(PROG, work)


def measured(experiment: Experiment, method: str, folder: Path, batches: int) -> list[dict[str, Any]]:
    """Signal and noise of a method's gradient and, where it has two, of each half.

    Raises:
        UserError: What the settings ask for does not fit together, or cannot be loaded.
    """
    scratch = folder / "noise"
    shutil.rmtree(scratch, ignore_errors=True)
    change = {"output": str(scratch), "train": {"steps": batches}, "objective": {"kl_every": 0}}
    given = merged(experiment.config(method, experiment.seeds[0], folder), change)
    parts = build(settled(cli.from_namespace(Config, given)))
    prompts = type(parts.method).prompts_per_step(parts.method.config)[1]
    with parts.run, parts.groups:
        found = gradients(parts, halves(parts), batches)
    if len(found) > 1:
        found["both"] = torch.stack(list(found.values())).sum(0)
    shutil.rmtree(scratch, ignore_errors=True)
    return [{"part": name, "prompts": prompts, "batches": batches, **noise(g, prompts)} for name, g in found.items()]


def halves(parts: Parts) -> dict[str, Method]:
    """The method itself or, for REAL with both, its exploration and its refinement."""
    method, objective = parts.method, parts.method.config.objective
    if method.name != "real" or not objective.exploration or not objective.beta:
        return {"all": method}
    alone = {"exploration": replace(objective, beta=0.0), "refinement": replace(objective, exploration=False)}
    return {
        name: type(method)(replace(method.config, objective=one), parts.encode_feedback, parts.scale)
        for name, one in alone.items()
    }


def gradients(parts: Parts, methods: dict[str, Method], batches: int) -> dict[str, torch.Tensor]:
    """[batches, n] some coordinates of each method's gradient, on the same batches, with the weights as they are."""
    policy, updater = parts.policy, parts.updater
    policy.train()
    found: dict[str, list[torch.Tensor]] = {name: [] for name in methods}
    for _ in range(batches):
        groups = parts.groups.next(parts.state, policy)
        micro = updater.micro_batches(groups)
        for name, method in methods.items():
            for i, batch in enumerate(micro):
                with updater.accumulate(last=i == len(micro) - 1):
                    policy(batch, method.loss(UpdateCounts.of(groups))).loss.backward()
            weights = [p for p in policy.model.parameters() if p.requires_grad]
            whole = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in weights])
            found[name].append(whole[::_STRIDE].cpu().clone())
            policy.zero_grad(set_to_none=True)
        parts.state.advance(len(groups), 0, 0)
    return {name: torch.stack(kept) for name, kept in found.items()}


def noise(gradients: torch.Tensor, prompts: int) -> dict[str, float | None]:
    """Signal and noise of batches' gradients.

    Args:
        gradients: [n, d] of n batches.
        prompts: In a batch, b.

    Returns:
        ``norm``, the root of the mean squared length of a batch's gradient, as the coordinates at hand tell it;
        ``signal``, the share of that square which is the true gradient's, |G|² / E|g|², with ``low`` and ``high`` two
        jackknife standard errors from it; and ``noise_scale``, tr(Σ) / |G|² in prompts, None where no signal was found.
    """
    products = (gradients.double() @ gradients.double().T).numpy()
    n = len(products)

    def share(kept: list[int]) -> float:
        """|G|² / E|g|²: products of two batches are the signal's, those of one with itself hold the noise as well."""
        own = sum(products[i, i] for i in kept) / len(kept)
        pairs = sum(products[i, j] for i in kept for j in kept if i != j) / (len(kept) * (len(kept) - 1))
        return float(pairs / own) if own > 0 else 0.0

    everything = list(range(n))
    value, without = share(everything), [share([j for j in everything if j != i]) for i in everything]
    mean = sum(without) / n
    error = math.sqrt((n - 1) / n * sum((w - mean) ** 2 for w in without))
    return {
        "norm": float((products.trace() / n * _STRIDE) ** 0.5),
        "signal": value,
        "low": value - 2 * error,
        "high": value + 2 * error,
        "noise_scale": prompts * (1 - value) / value if value > 0 else None,
    }


if __name__ == "__main__":
    sys.exit(main())
