"""How far each way to full fine-tuning in less memory ends from fp32 AdamW, over 100 updates of SmolLM2-135M by REAL.

``python -m benchmarks.optimizers`` writes results/optimizers.json, which docs/less-memory.md has its table from. Every
option trains a model of its own, from the same start, on the same small groups, at the learning rate of RL.
``python -m benchmarks.optimizers NAME [...]`` runs fp32 AdamW, which errors are to, and the options named; the file's
other lines stay. A number among the arguments is how many updates are made: other than 100, nothing is written.
``python -m benchmarks.optimizers gradients`` compares the gradients of two updates in bf16 with those in fp32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import ROOT, machine
from real_fast.batching.micro_batches import micro_batches
from real_fast.config import Config
from real_fast.methods.base import UpdateCounts
from real_fast.methods.real import Real
from real_fast.model.load import load_tokenizer
from real_fast.model.policy import Policy
from real_fast.model.smollm2 import prepare
from real_fast.score.scale import ScoreScale
from real_fast.training.optim import build_optimizer, clip_and_step
from real_fast.training.setup import load_policy
from real_fast.types import Group, Rollout

STEPS, LR = 100, 1e-6
RESULTS = ROOT / "benchmarks" / "results" / "optimizers.json"
# By name: settings of optim, and of train.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adamw, fp32": ({}, {"precision": "fp32"}),
    "adamw8bit": ({"name": "adamw8bit"}, {"precision": "fp32"}),
    "bf16 products over fp32 weights": ({}, {"precision": "bf16"}),
    "bf16 products, adamw8bit, offload all, fused head gradient": (
        {"name": "adamw8bit", "offload": "all"},
        {"precision": "bf16", "head_gradient": "fused"},
    ),
    "weights in bf16 (refused)": ({}, {"precision": "bf16", "weights": "bf16"}),
}


def groups_of(tokenizer: Any, scale: ScoreScale) -> Iterator[list[Group]]:
    """An update's two groups of two rollouts, 52 tokens in all, out of this project's pages; ever others."""
    pages = "\n".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md"))[:3])
    ids = tokenizer(pages)["input_ids"]
    phrase, at = list(scale.phrase_ids), 0

    def take(n: int) -> list[int]:
        nonlocal at
        at += n
        return [ids[i % len(ids)] for i in range(at - n, at)]

    while True:
        groups = []
        for index in range(2):
            prompt, rollouts = take(8), []
            for _ in range(2):
                text = [*take(4), *phrase]
                rollouts.append(Rollout(text, [-1.0] * len(text), text, 0, "phrase", [-1.6] * 5, 3.0))
            groups.append(Group(index, prompt, float(1 + (at + index) % 5), rollouts))
        yield groups


def weights(policy: Policy) -> torch.Tensor:
    """[P] all of them in float32."""
    return torch.cat([p.detach().float().flatten() for p in policy.model.parameters()])


def train(folder: Path, steps: int, optim: dict[str, Any], train: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """[P] what the updates add to the weights, and the last update's loss."""
    config = Config(model=str(folder))
    for section, values in ((config.optim, optim), (config.train, train)):
        for key, value in values.items():
            setattr(section, key, value)
    # Divided by the spread of two nearly equal rewards, advantages would magnify any rounding, and not an optimiser's.
    config.objective.normalize_std = False
    config.optim.lr = 1.0  # which nothing refuses
    policy = load_policy(config, None)
    config.optim.lr = LR
    tokenizer = load_tokenizer(config.model)
    scale = ScoreScale.from_tokenizer(tokenizer, config.scale.values, config.scale.phrase)
    method, start = Real(config, lambda _: [], scale), weights(policy)
    optimizer = build_optimizer(policy, config.optim)
    if config.optim.name == "adamw8bit":  # compiled, as on a GPU: on a CPU it is not, and takes some seconds a step
        optimizer.__class__ = next(k for k in type(optimizer).__mro__ if k.__module__.startswith("torchao"))
    policy.train()
    loss = float("nan")
    for _, groups in zip(range(steps), groups_of(tokenizer, scale), strict=False):
        loss, loss_of = 0.0, method.loss(UpdateCounts.of(groups))
        with policy.working():
            for batch in micro_batches(groups, 40, tokenizer.pad_token_id, True):
                out = policy(batch, loss_of)
                out.loss.backward()
                loss += float(out.loss.detach())
        clip_and_step(policy, optimizer, 1.0)
    return weights(policy) - start, loss


def gradients(folder: Path, precision: Any) -> Iterator[torch.Tensor]:
    """[P] of the groups of one update after another, the weights staying as they are."""
    config = Config(model=str(folder))
    config.train.precision, config.objective.normalize_std, config.optim.lr = precision, False, 1.0
    policy, tokenizer = load_policy(config, None).train(), load_tokenizer(config.model)
    scale = ScoreScale.from_tokenizer(tokenizer, config.scale.values, config.scale.phrase)
    method = Real(config, lambda _: [], scale)
    for groups in groups_of(tokenizer, scale):
        policy.zero_grad()
        loss_of = method.loss(UpdateCounts.of(groups))
        with policy.working():
            for batch in micro_batches(groups, 40, tokenizer.pad_token_id, True):
                policy(batch, loss_of).loss.backward()
        yield torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


def compare_gradients() -> None:
    """Print cosine and signs of two updates' gradients, and how far apart AdamW's first steps, their signs, are."""
    folder = prepare()
    for _, want, found in zip(range(2), gradients(folder, "fp32"), gradients(folder, "bf16"), strict=False):
        cosine = float(torch.nn.functional.cosine_similarity(want.double(), found.double(), dim=0))
        signs, other = want.sign(), found.sign()
        apart = float((signs - other).norm() / signs.norm())
        differ = float((signs != other).float().mean())
        print(json.dumps({"cosine": cosine, "signs that differ": differ, "first step's error": apart}), flush=True)


def main(argv: Sequence[str]) -> None:
    """Run every option, or those named, and write what came out."""
    if list(argv) == ["gradients"]:
        compare_gradients()
        return
    steps = next((int(one) for one in argv if one.isdigit()), STEPS)
    named = [one for one in argv if not one.isdigit()]
    if unknown := set(named) - OPTIONS.keys():
        raise SystemExit(f"no option is called {', '.join(sorted(unknown))}; there are: {'; '.join(OPTIONS)}")
    folder, want = prepare(), torch.empty(0)
    lines: dict[str, dict[str, Any]] = {}
    if named and RESULTS.is_file():
        lines = {line["option"]: line for line in json.loads(RESULTS.read_text(encoding="utf-8"))["options"]}
    for place, (name, (optim, settings)) in enumerate(OPTIONS.items()):
        if place and named and name not in named:
            continue
        moved, loss = train(folder, steps, optim, settings)
        want = want if len(want) else moved
        error = float((moved - want).norm() / want.norm())
        share = float((moved != 0).float().mean())
        lines[name] = {"option": name, "error": error, "moved": share, "loss": loss}
        print(json.dumps(lines[name]), flush=True)
        if steps == STEPS:
            ordered = [lines[option] for option in OPTIONS if option in lines]
            report = {**machine(), "model": "SmolLM2-135M", "steps": steps, "lr": LR, "options": ordered}
            RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
