"""What several test modules share: groups made by hand, one update, and runs from the command line."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from real_fast.batching.micro_batches import micro_batches
from real_fast.config import Config, RolloutConfig
from real_fast.config.schema import ObjectiveConfig
from real_fast.data.synthetic import generate
from real_fast.methods.base import UpdateCounts
from real_fast.methods.registry import METHODS
from real_fast.score.scale import ScoreScale
from real_fast.types import Group, Rollout
from real_fast.utils.jsonio import read_jsonl, write_jsonl

EOS = 2

SCALE = ScoreScale((1.0, 2.0, 3.0), ("1", "2", "3"), (50, 51, 52), "score: ", (60, 61), 1)

LONG = 10**6


def make_groups(seed=0, n=3, k=4, missing=False):
    g = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (), generator=g))
        return torch.randint(3, 300, (length,), generator=g).tolist()

    groups = []
    for index in range(n):
        prompt = ids(3, 12)
        prompt[1] = EOS  # a chat template ends its turns inside the prompt
        rollouts = []
        for i in range(k):
            text = ids(1, 9)
            if i == 0:  # stopped by EOS: the phrase is appended, EOS stays an action
                rollout = Rollout([*text, EOS], [-1.0] * (len(text) + 1), [*text, 60, 61], 2, "eos", [-1.0] * 3, None)
            elif i == 1:  # cut at the length limit
                rollout = Rollout(text, [-1.0] * len(text), [*text, 60, 61], 2, "length", [-1.0] * 3, None)
            else:  # wrote the phrase itself
                text = [*text, 60, 61]
                rollout = Rollout(text, [-1.0] * len(text), text, 0, "phrase", [-1.0] * 3, 2.0)
            if missing and i == 2:
                rollout.score_logprobs = None
            rollouts.append(rollout)
        label = [1.0, 2.5, 3.0][index % 3]
        groups.append(Group(index, prompt, label, rollouts))
    return groups


def make_method(name="real", objective=None, temperature=1.0, scale=SCALE):
    """A method without a tokenizer, for tests of its loss."""
    config = Config(
        method=name, objective=objective or ObjectiveConfig(), rollout=RolloutConfig(temperature=temperature)
    )
    return METHODS[name](config, None, scale)


def run_update(policy, groups, budget=LONG, config=None, compare=False):
    policy.zero_grad()
    loss_of = make_method("real", config).loss(UpdateCounts.of(groups), compare=compare)
    outputs = []
    for batch in micro_batches(groups, budget, 0, policy.attention is not None):
        out = policy(batch, loss_of)
        out.loss.backward()
        outputs.append((batch, out))
    loss = sum(out.loss.detach() for _, out in outputs)
    return loss, {name: p.grad.clone() for name, p in policy.named_parameters()}, outputs


SETTINGS = """
data: {train: TRAIN, eval: EVAL, max_eval: 12}
prompt: {template: short, system: Grade.}
rollout: {engine: transformers, prompts_per_step: 3, group_size: 3, max_tokens: 12}
warmup: {steps: 2, batch_size: 4}
optim: {lr: 1.0e-3}
train: {steps: 5, precision: fp32}
eval: {bootstrap: 10}
save: {every: 2, keep: 9}
"""


def flags(model, output, *more):
    """The command line of a short run on a few of the generated rows: reading all of them would take the longest."""
    config, settings = model / "run.yaml", SETTINGS
    for name, size in (("train", (20, 4)), ("eval", (8, 4))):
        rows = model / f"{name}.jsonl"
        if not rows.is_file():
            write_jsonl(rows, generate(*size, seed=0, which=name))
        settings = settings.replace(name.upper(), json.dumps(str(rows)))  # whatever the folder is called
    config.write_text(settings, encoding="utf-8")
    return ["--config", str(config), "--model", str(model), "--output", str(output), *more]


def metric_lines(output):
    lines = read_jsonl(output / "metrics.jsonl")
    for line in lines:
        for name in [name for name in line if name == "step_time" or name.startswith(("time/", "memory/"))]:
            line.pop(name)
        for part in (line.get("eval") or {},):
            part.pop("seconds", None)
            part.pop("tokens_per_second", None)
    return lines


def same_weights(a, b):
    first, second = load_file(a / "final" / "model.safetensors"), load_file(b / "final" / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


SUPERVISED = ["--supervised.prompts_per_step", "4", "--warmup.steps", "0", "--train.steps", "3"]


def size(group, shared):
    return group.shared_tokens if shared else len(group.rollouts) * group.longest


CLOSE = {"rel": 1e-3, "abs": 1e-4, "nan_ok": True}


def about_the_same(found, want, path=""):
    if isinstance(want, dict):
        assert found.keys() == want.keys(), path
        for key in want:
            about_the_same(found[key], want[key], f"{path}/{key}")
    elif isinstance(want, float | list):
        assert found == pytest.approx(want, **CLOSE), path
    else:
        assert found == want, path


def rollout_texts(output):
    return [(line["step"], line["id"], line["rollout"], line["text"]) for line in read_jsonl(output / "rollouts.jsonl")]


def free_port():
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def serve_example():
    """examples/serve.py, which is no package, as a module."""
    file = Path(__file__).resolve().parents[1] / "examples" / "serve.py"
    spec = importlib.util.spec_from_file_location("serve_example", file)
    module = sys.modules["serve_example"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
