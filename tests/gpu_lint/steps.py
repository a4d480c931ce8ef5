"""Whole updates on a pretended CUDA device: every method, attention and precision, and what changes their way.

An update here is that of :class:`real_fast.train.Trainer` with its metrics and the lines of rollouts.jsonl, on groups
made by hand: no engine samples, and nothing is read or saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from real_fast.config import Config, LoraConfig, WarmupConfig
from real_fast.config.schema import ObjectiveConfig, OptimConfig, RolloutConfig, TrainConfig
from real_fast.distributed.world import ALONE
from real_fast.methods.registry import METHODS
from real_fast.model import ref_policy
from real_fast.runs.checkpoint import TrainState
from real_fast.train import Trainer
from real_fast.training.optim import build_optimizer, build_scheduler
from real_fast.training.rollout_log import rollout_lines
from real_fast.training.setup import load_policy
from real_fast.training.step_metrics import StepMetrics
from real_fast.training.timer import Timer
from real_fast.training.update import Updater
from real_fast.training.warmup import sft_order, warm_up
from real_fast.types import JudgeRow
from tests.conformance import groups_for, letters
from tests.gpu_lint.launches import checked_launches
from tests.gpu_lint.pretend import CUDA, Pretended, cuda_device
from tests.helpers import SCALE

BUDGET = 120  # tokens of a micro-batch: several of them in an update


@dataclass(frozen=True)
class Case:
    """An update by a method, and the settings that matter to it."""

    method: str = "real"
    train: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    compare: bool = False  # whether engine and trainer are compared in it
    warmup: bool = False  # the warm-up's update in place of the method's
    updates: int = 1  # of which the last is looked at

    def config(self, model: Path, device: str) -> Config:
        """Its settings."""
        train: dict[str, Any] = {"precision": "bf16", "micro_batch_tokens": BUDGET, "device": device} | self.train
        return Config(
            model=str(model),
            output="unused",
            method=self.method,
            rollout=RolloutConfig(group_size=4),
            train=TrainConfig(**train),
            objective=ObjectiveConfig(**self.objective),
            optim=OptimConfig(**{"lr": 1e-4} | self.optim),
        )


FP32 = {"precision": "fp32"}
CASES: dict[str, Case] = {
    "real": Case(),  # bf16, varlen
    "real, compared with the engine": Case(compare=True),
    "real, sdpa": Case(train={"attention": "sdpa"}),
    "real, padded": Case(train={"shared_prompt": False}),
    "real, sdpa, fp32": Case(train=FP32),
    "real, padded, fp32": Case(train=FP32 | {"shared_prompt": False}),
    "real, bf16 weights": Case(train={"weights": "bf16"}, optim={"lr": 1e-2}),
    "real, checkpointed activations": Case(train=FP32 | {"activation_checkpointing": True}),
    "real, KL, two iterations": Case(objective={"kl_coef": 0.1, "num_iterations": 2}),
    "real, KL measured": Case(train=FP32, objective={"kl_every": 1}),
    "real, moments on the host": Case(train=FP32, optim={"offload": "moments"}, updates=2),  # the first makes them
    "real, everything on the host": Case(optim={"offload": "all"}),
    "real, LoRA": Case(train={"lora": LoraConfig(r=2)}),
    "binary_rl": Case("binary_rl"),
    "sft": Case("sft"),
    "sft, fp32": Case("sft", train=FP32),
    "raft": Case("raft"),
    "tract": Case("tract"),
    "warm-up": Case(warmup=True),
}


@dataclass
class Outcome:
    """Of a case.

    Attributes:
        waits: By place and kind, in the one update.
        launches: Of Triton kernels, by name.
        loss: Of the update.
        grad_norm: Before clipping.
    """

    waits: Counter[tuple[str, str]]
    launches: Counter[str]
    loss: float
    grad_norm: float


def make_model(folder: Path) -> Path:
    """A random Llama for :data:`tests.helpers.SCALE` and its groups, as a folder. Its head is not tied."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
        LlamaForCausalLM(LlamaConfig(vocab_size=384, **shape, **heads)).save_pretrained(folder)
    return folder


def run(case: Case, model: Path, folder: Path) -> Outcome:
    """One update on the pretended device. Raises what a GPU would, or :class:`LaunchError`."""
    with cuda_device() as mode, checked_launches() as launched, _reference_stays():

        def begin() -> None:
            mode.waits.clear()
            launched.clear()

        policy, loss, grad_norm = update(case, model, folder, "cuda", begin)
        waits = mode.waits.copy()
        home = torch.device("cpu") if case.optim.get("offload") == "all" else CUDA
        for name, parameter in policy.named_parameters():
            if parameter.device != home or (home == CUDA) != isinstance(parameter, Pretended):
                raise AssertionError(f"{name} ends up on {parameter.device}")
    return Outcome(waits, launched, loss, grad_norm)


@contextmanager
def _reference_stays() -> Iterator[None]:
    """A frozen policy stays where it is: parameters cannot become pretended ones (see tests/model/test_waiting.py)."""
    copy = ref_policy.frozen_copy
    stays = {"frozen_copy": lambda policy, _: copy(policy, policy.device), "Waiting": lambda *_: None}
    with patch.multiple(ref_policy, **stays):
        yield


def on_the_cpu(case: Case, model: Path, folder: Path) -> tuple[float, float]:
    """Loss and gradient norm of the same update, computed as on any CPU, in fp32."""
    settings = {k: v for k, v in case.train.items() if k not in ("attention", "weights")}
    plain = replace(case, train=settings | FP32, optim={})
    return update(plain, model, folder, "cpu", lambda: None)[1:]


def update(case: Case, model: Path, folder: Path, device: str, begin: Callable[[], None]) -> tuple[Any, float, float]:
    """The policy, and the loss and gradient norm of one update; `begin` is called right before it."""
    config = case.config(model, device)
    torch.manual_seed(0)
    policy = load_policy(config, None)
    method = METHODS[case.method](config, letters, SCALE)
    groups = groups_for(method)
    optimizer = build_optimizer(policy.model, config.optim)
    scheduler = build_scheduler(optimizer, config.optim, 10)
    state, timer = TrainState(), Timer({})
    updater = Updater(policy, optimizer, scheduler, config.optim, config.train, 0, ALONE, timer, state)
    if case.warmup:
        return policy, *_warmed_up(updater, begin)
    if config.objective.kl_coef or "kl_every" in case.objective:
        method.begin(policy, folder)
    trainer = Trainer.__new__(Trainer)  # its parts, without a run's folder, data and engine
    trainer.config, trainer.world, trainer.state, trainer.timer = config, ALONE, state, timer
    trainer.method, trainer.policy, trainer.updater = method, policy, updater
    trainer.groups = SimpleNamespace(compares=lambda _: case.compare, check=lambda *_: None)  # type: ignore[assignment]
    _put_scale(policy.device)
    result: dict[str, Any] = {}
    for _ in range(case.updates):
        begin()
        metrics = StepMetrics(groups, SCALE)
        trainer.update(groups, metrics)
        result = metrics.result() | updater.metrics()
        list(rollout_lines(metrics, 1, 1, SCALE, SimpleNamespace(decode=lambda ids, **_: str(ids))))
    return policy, result["loss"], result["grad_norm"]


def _put_scale(device: torch.device) -> None:
    """Its tensors are copied to a device once in a process, and not in every update."""
    device = torch.empty(0, device=device).device  # with its number, as tensors name it
    SCALE.ids_tensor(device), SCALE.values_tensor(device)


def _warmed_up(updater: Updater, begin: Callable[[], None]) -> tuple[float, float]:
    texts = ["Right.", "No", "It follows the rubric, but says nothing of why."]
    rows = [JudgeRow(str(n), str(n), "", "", "", "", 2.0, [x], [2.0], [5, 6, 7 + n]) for n, x in enumerate(texts)]
    warmup, lines = WarmupConfig(steps=1, batch_size=3), []
    order = sft_order(rows, warmup, "these rows", 0)
    _put_scale(updater.policy.device)
    begin()
    warm_up(updater, order, warmup, letters, SCALE, lines.append, nullcontext)  # type: ignore[arg-type]
    return lines[0]["loss"], lines[0]["grad_norm"]
