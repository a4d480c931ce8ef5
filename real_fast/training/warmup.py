"""The warm-up on feedback: cross-entropy before the method starts, so that a small model knows the format."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from real_fast.config import OptimConfig, WarmupConfig
from real_fast.data.sampler import PromptSampler
from real_fast.errors import DataError
from real_fast.methods.base import UpdateCounts
from real_fast.methods.sft import SFT
from real_fast.methods.supervised import supervised_group, supervised_loss
from real_fast.prompt.guard import EncodeFeedback
from real_fast.runs.progress import progress_bar
from real_fast.score.scale import ScoreScale
from real_fast.training.optim import build_optimizer, clip_and_step
from real_fast.training.spikes import Spikes
from real_fast.training.update import Updater
from real_fast.types import JudgeRow

SftOrder = PromptSampler[tuple[JudgeRow, int]]


def sft_order(rows: Sequence[JudgeRow], warmup: WarmupConfig, source: str, seed: int) -> SftOrder:
    """The order of the warm-up's rows, one entry per feedback text.

    Raises:
        DataError: There is to be a warm-up, and no row has feedback.
    """
    pairs = [(row, i) for row in rows for i in range(len(row.feedbacks))]
    if warmup.steps and not pairs:
        raise DataError(
            f"warmup.steps is {warmup.steps}, and no row of {source} has feedback: "
            "set warmup.steps to 0, or give feedback with the rows"
        )
    return PromptSampler(pairs, warmup.batch_size, seed)


def warm_up(
    updater: Updater,
    order: SftOrder,
    warmup: WarmupConfig,
    encode_feedback: EncodeFeedback,
    scale: ScoreScale,
    log: Callable[[dict[str, Any]], None],
    check_stop: Callable[[], None],
) -> None:
    """Train with an optimiser of its own, whose learning rate decays to a tenth.

    Args:
        updater: Makes micro-batches and knows the policy, the clipping and the timer.
        order: As :func:`sft_order` gives it.
        warmup: steps, batch_size and lr.
        encode_feedback: Gives the token ids of feedback texts.
        scale: The score scale.
        log: Called with the metrics of every step.
        check_stop: Called before every step; raises to stop.

    Raises:
        NothingTrainedError: Too many steps in a row were skipped.
    """
    policy = updater.policy
    optim = OptimConfig(lr=warmup.lr, name=updater.optim.name, offload=updater.optim.offload)
    optimizer = build_optimizer(policy, optim)
    spikes = Spikes(updater.optim.max_grad_norm)  # of another loss than the updates behind it
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=warmup.steps)
    with progress_bar("warm-up (cross-entropy)", warmup.steps, "step") as bar:
        for step in range(warmup.steps):
            check_stop()
            policy.train()
            with updater.timer("warmup"):
                started = time.perf_counter()
                picked = order.batch(step * warmup.batch_size)
                groups = [supervised_group(row, [i], n, encode_feedback, scale) for n, (row, i) in enumerate(picked)]
                counts = UpdateCounts.of(groups)
                parts: list[torch.Tensor] = []
                batches = updater.micro_batches(groups)
                for i, batch in enumerate(batches):
                    with updater.accumulate(last=i == len(batches) - 1):
                        out = policy(batch, supervised_loss(SFT, scale, counts))
                        out.loss.backward()
                    parts.append(torch.stack([out.loss.detach(), out.parts["score"]]))
                lr = float(decay.get_last_lr()[0])
                norm, stepped = clip_and_step(policy, optimizer, updater.optim.max_grad_norm, updater.world)
                if stepped:
                    decay.step()
                    spikes.see(norm)
                updater.idle.step(stepped)
                # Behind the step, which waits for the device in any case.
                found = [pair for some in updater.world.gather(torch.stack(parts).tolist()) for pair in some]
                loss = sum(loss for loss, _ in found)
                score_loss = sum(score * (counts.tokens + counts.rollouts) / counts.rollouts for _, score in found)
            log(
                {
                    "phase": "warmup",
                    "step": step + 1,
                    "loss": loss,
                    "score_loss": score_loss,
                    "grad_norm": norm,
                    "skipped": not stepped,
                    "learning_rate": lr,
                    "step_time": time.perf_counter() - started,
                }
            )
            bar.update()
            if error := updater.idle.end():
                raise error
