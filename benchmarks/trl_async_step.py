"""TRL's AsyncGRPOTrainer on given rollouts: since 1.16 it shares prompts in a prefix trie and has a fused head.

Its attention is FlashAttention 3's, which TRL fetches as a package of the hub: where there is no network it must lie in
the hub's cache, and `absent` says so if it does not.
"""

from __future__ import annotations

import importlib
import os
import queue
from typing import Any

import torch

from benchmarks.trl_step import Stepwise
from benchmarks.trl_step import absent as without_trl
from benchmarks.workload import Workload


def absent(device: torch.device) -> str:
    """Why it does not run here, or ""."""
    if reason := without_trl():
        return reason
    if device.type != "cuda":
        return "FlashAttention 3: needs a CUDA device"
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        importlib.import_module("trl.experimental.async_grpo")
        importlib.import_module("trl.experimental.async_grpo.packing")._flash_attn()
    except Exception as error:  # an older TRL, a package that it needs, or no network
        first = (str(error).splitlines() or [""])[0]
        return f"not installed: trl.experimental.async_grpo or its FlashAttention 3: {type(error).__name__}: {first}"
    return ""


class _Rollouts:
    """Trainer's rollout worker: everything is there from the beginning, and never too old."""

    def __init__(self, samples: list[Any]) -> None:
        self.rollout_buffer: queue.Queue[Any] = queue.Queue()
        self.metrics_queue: queue.Queue[Any] = queue.Queue()
        for sample in samples:
            self.rollout_buffer.put(sample)

    def start(self) -> None:
        """Nothing to start."""

    def stop(self) -> None:
        """Nothing to stop."""

    def update_model_version(self, model_version: int) -> None:
        """Nobody samples."""

    def check_health(self, stale_after_s: float) -> None:
        """Called while the queue is empty: nothing more will come.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("the trainer asks for more rollouts than there are")


class _NoTransfer:
    """Trainer's weight transfer, to nobody."""

    def init_weight_transfer(self) -> None:
        """Nothing to set up."""

    def pause(self) -> None:
        """No server to pause."""

    def send_weights(self, iterator: Any) -> None:
        """To nobody."""

    def resume(self) -> None:
        """No server to resume."""

    def destroy(self) -> None:
        """Nothing to release."""


class AsyncTrlStep(Stepwise):
    """AsyncGRPOTrainer with its rollouts handed in, and no server: its packing, forward, loss, backward, optimiser.

    Activation checkpointing, on by default in TRL, is off as it is for the others.

    Args:
        model: A causal language model; the trainer loads a copy from a folder, the one way it takes
            models, and this one is emptied.
        tokenizer: Its tokenizer.
        workload: The groups.
        budget: Tokens of a forward pass: as many whole groups as fit.
        steps: Optimiser steps that will be asked for in all.
    """

    def __init__(self, model: Any, tokenizer: Any, workload: Workload, budget: int, steps: int) -> None:
        super().__init__()
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from datasets import Dataset

        module: Any = importlib.import_module("trl.experimental.async_grpo")
        folder = f"{self.folder.name}/model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model.to("meta")  # the trainer's copy takes its place, in the measured memory too
        largest = max(group.shared_tokens for group in workload.groups)
        groups = max(g for g in range(1, len(workload.groups) + 1) if _fits(g, largest, budget, len(workload.groups)))
        cuda = torch.cuda.is_available()
        config = module.AsyncGRPOConfig(
            output_dir=self.folder.name,
            per_device_train_batch_size=groups * workload.k,
            gradient_accumulation_steps=len(workload.groups) // groups,
            num_generations=workload.k,
            token_budget=0,  # so many sequences a pass
            max_steps=steps,
            max_staleness=10**6,
            weight_sync_steps=10**6,
            learning_rate=1e-9,
            bf16=True,
            use_cpu=not cuda,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        self.trainer = module.AsyncGRPOTrainer(
            model=folder,
            args=config,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=Dataset.from_dict({"prompt": ["x"] * max(len(workload.groups), 8)}),
            processing_class=tokenizer,
            callbacks=[self.callback],
            rollout_worker=_Rollouts(samples(workload, steps)),
            weight_transfer=_NoTransfer(),
        )
        # A prompt's last token is laid out once a response, as each response follows it in a branch of its own.
        self.body_tokens = sum(group.shared_tokens + len(group.rollouts) - 1 for group in workload.groups)
        self.start()


def _fits(groups: int, tokens: int, budget: int, all_groups: int) -> bool:
    """Whether so many groups make up a pass: within the budget, and an update is whole passes."""
    return all_groups % groups == 0 and (groups == 1 or groups * tokens <= budget)


def samples(workload: Workload, steps: int) -> list[Any]:
    """The rollouts of so many updates, and of one more, since a batch is fetched ahead, as TRL's worker has them."""
    import numpy

    module: Any = importlib.import_module("trl.experimental.async_grpo.async_rollout_worker")
    advantages = torch.randn(len(workload.rollouts), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [(group, rollout) for group in workload.groups for rollout in group.rollouts]
    made = []
    for (group, rollout), advantage in zip(pairs, advantages, strict=True):
        p, r = len(group.prompt_ids), len(rollout.context_ids)
        made.append(
            module.RolloutSample(
                prompt=[],
                completion=[],
                input_ids=numpy.array([*group.prompt_ids, *rollout.context_ids]),
                completion_mask=numpy.array([0] * p + [1] * r),
                old_log_probs=numpy.zeros(p + r, dtype=numpy.float32),
                advantage=advantage,
                model_version=0,
                group_id=group.index,
                metrics={},
            )
        )
    return made * (steps + 1)
