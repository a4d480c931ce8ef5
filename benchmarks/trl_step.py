"""TRL's update on given rollouts: the real GRPOTrainer and its own training loop, one optimiser step at a time.

Its AsyncGRPOTrainer stands in ``benchmarks/trl_async_step.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
import threading
from typing import Any

import torch

from benchmarks.phases import Phases
from benchmarks.workload import Workload

AVAILABLE = importlib.util.find_spec("trl") is not None


def load() -> Any:
    """Import TRL, which takes memory and time that are not the step's."""
    return importlib.import_module("trl")


def absent() -> str:
    """Why it does not run here, or ""."""
    missing = [name for name in ("trl", "datasets", "accelerate") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


class Stepwise:
    """A training loop of Transformers' Trainer in a thread of its own, held before every step until it is asked for."""

    def __init__(self) -> None:
        from transformers import TrainerCallback

        resume, done = self.resume, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.folder = tempfile.TemporaryDirectory()
        self.error: BaseException | None = None
        self.trainer: Any = None

        class Held(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                resume.acquire()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                done.release()

        self.callback = Held()

    def start(self) -> None:
        """Begin, up to the first step."""
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()

    def _train(self) -> None:
        try:
            self.trainer.train()
        except BaseException as error:  # handed on to the thread that waits
            self.error = error
            self.done.release()

    def step(self, phases: Phases) -> float:
        """One optimiser step of the training loop."""
        with phases("step"):
            self.resume.release()
            self.done.acquire()
        if self.error is not None:
            raise self.error
        return float("nan")

    def close(self) -> None:
        """Wait for the training loop to end and remove its folder."""
        self.thread.join(timeout=60)
        self.folder.cleanup()


class TrlStep(Stepwise):
    """GRPOTrainer as its users run it, with the rollouts and advantages handed in instead of generated.

    Generation, rewards and their forward pass are left out, in TRL's favour; everything from the loss's forward pass to
    the optimiser is TRL's and Transformers' own. Activation checkpointing, on by default in TRL, is off here as it is
    for the others. TRL 1.16 has a fused head of its own in place of Liger's loss; on CUDA it leaves prompt tokens out,
    on the CPU it scores them too.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        workload: The groups.
        sequences: Sequences per forward pass.
        steps: Optimiser steps that will be asked for in all.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        workload: Workload,
        sequences: int,
        steps: int,
    ) -> None:
        super().__init__()
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from datasets import Dataset

        trl: Any = load()
        inputs = _inputs(workload, tokenizer.pad_token_id, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        total = len(workload.rollouts)

        class Given(trl.GRPOTrainer):
            def _generate_and_score_completions(self, _inputs: Any) -> dict[str, Any]:
                return {name: tensor.clone() for name, tensor in inputs.items()}

        config = trl.GRPOConfig(
            output_dir=self.folder.name,
            per_device_train_batch_size=sequences,
            gradient_accumulation_steps=total // sequences,
            num_generations=workload.k,
            max_steps=steps,
            learning_rate=1e-9,
            beta=0.0,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=0,
        )
        self.trainer = Given(
            model=model,
            processing_class=tokenizer,
            args=config,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            train_dataset=Dataset.from_dict({"prompt": ["x"] * max(len(workload.groups), 8)}),
            callbacks=[self.callback],
        )
        self.body_tokens = inputs["prompt_ids"].numel() + inputs["completion_ids"].numel()
        self.start()


def _inputs(workload: Workload, pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What TRL's rollout function returns: prompts padded on the left, completions on the right."""
    pairs = [(group, rollout) for group in workload.groups for rollout in group.rollouts]
    p = max(len(group.prompt_ids) for group, _ in pairs)
    r = max(len(rollout.context_ids) for _, rollout in pairs)
    prompt, completion = torch.full((len(pairs), p), pad), torch.full((len(pairs), r), pad)
    prompt_mask, completion_mask = torch.zeros_like(prompt), torch.zeros_like(completion)
    for i, (group, rollout) in enumerate(pairs):
        prompt[i, p - len(group.prompt_ids) :] = torch.tensor(group.prompt_ids)
        prompt_mask[i, p - len(group.prompt_ids) :] = 1
        completion[i, : len(rollout.context_ids)] = torch.tensor(rollout.context_ids)
        completion_mask[i, : len(rollout.context_ids)] = 1
    advantages = torch.randn(len(pairs), generator=torch.Generator().manual_seed(0))
    tensors = {
        "prompt_ids": prompt,
        "prompt_mask": prompt_mask,
        "completion_ids": completion,
        "completion_mask": completion_mask,
        "advantages": advantages,
        "num_items_in_batch": completion_mask.sum(),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}
