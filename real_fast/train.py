"""Train a judge by REAL (Regression-Aware Reinforcement Learning for LLM-as-a-Judge, arXiv 2603.17145).

Or by one of the methods that it is compared with.

    python -m real_fast.train --config configs/quickstart.yaml

Sample feedback, score it, update, evaluate, log; this file reads in that order.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from real_fast.attention.interface import pick_backend
from real_fast.attention.support import require_span
from real_fast.batching.micro_batches import micro_batches
from real_fast.config import Config, OptimConfig, cli
from real_fast.data.dataset import load_train_eval, write_rejected
from real_fast.data.sampler import PromptSampler
from real_fast.errors import (
    BatchError,
    CheckpointError,
    ConfigError,
    DataError,
    EngineMismatchError,
    ModelError,
    PromptError,
    ScaleError,
    SharedPromptError,
)
from real_fast.evaluation.run import evaluate
from real_fast.methods.objective import Totals, draw_scores
from real_fast.methods.registry import method_loss
from real_fast.methods.supervised import SFT, given_feedback, pick_feedback, supervised_objective, with_feedback
from real_fast.model.load import load_model, load_tokenizer, pick_device, resolve_model
from real_fast.model.policy import Policy
from real_fast.model.ref_policy import Reference
from real_fast.prompt.builder import PromptBuilder
from real_fast.reports import report
from real_fast.rollout.make import make_engine
from real_fast.runs import checkpoint, trackers
from real_fast.runs.checkpoint import TrainState
from real_fast.runs.folder import RunFolder
from real_fast.runs.stop import Stopped, StopSignal
from real_fast.score.scale import ScoreScale
from real_fast.training.optim import build_optimizer, build_scheduler, clip_and_step
from real_fast.training.preflight import longest_sequence, require_given_room, require_room
from real_fast.training.step_metrics import StepMetrics
from real_fast.types import Batch, Group, JudgeRow, Sampling

KNOWN_ERRORS = (
    BatchError,
    CheckpointError,
    ConfigError,
    DataError,
    EngineMismatchError,
    FloatingPointError,
    ModelError,
    OSError,
    PromptError,
    ScaleError,
    SharedPromptError,
)


class Trainer:
    """One run. The methods stand in the order in which they are called."""

    def __init__(self, config: Config) -> None:
        config.validate()
        trackers.require(config)
        self.config = config
        self.state = TrainState()
        self.stop = StopSignal()
        self.seconds: dict[str, float] = {}  # of the update at hand, by phase
        with self.timed("load"):
            self.folder = RunFolder(config)
            found = checkpoint.complete(self.folder.checkpoints) if self.folder.resumed else []
            self.found = found[-1] if found else None
            self.tokenizer = load_tokenizer(config.start, config.trust_remote_code)
            self.scale = ScoreScale.from_tokenizer(self.tokenizer, config.scale.values, config.scale.phrase)
            builder = PromptBuilder(config.prompt, self.tokenizer, self.scale)
            self.data = load_train_eval(config, builder, self.scale)
            if config.samples:
                require_room(self.data.train, self.scale, config)
                longest = longest_sequence(self.data.train, self.scale, config)
            else:
                with_feedback(self.data, config)
                longest = require_given_room(self.data.train, config, self.tokenizer, self.scale)
            self.sampler = PromptSampler(self.data.train, config.prompts_per_step, config.seed)
            self.feedback = self.rows_with_feedback()
            # Methods on given feedback have been checked with as much of it or more.
            if config.warmup.steps and (config.samples or config.supervised.feedback == "none"):
                room = require_given_room(self.data.train, config, self.tokenizer, self.scale, warmup=True)
                longest = max(longest, room)

            self.device = pick_device(config.train.device)
            torch.manual_seed(config.seed)
            source = str(self.found) if self.found else config.start
            model = load_model(source, self.device, torch.float32, config.trust_remote_code)
            self.folder.require_space(model.num_parameters(), config.save.keep, config.keeps_reference)
            if config.train.activation_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            half = torch.bfloat16 if config.train.precision == "bf16" else None
            attention = pick_backend(config.train.attention, self.device, half or model.dtype)
            self.policy = Policy(model, half, attention if config.train.shared_prompt else None)
            if self.policy.attention:
                require_span(model, longest)
            self.optimizer = build_optimizer(model, config.optim)
            optimizer_steps = config.train.steps * (config.objective.num_iterations if config.samples else 1)
            self.scheduler = build_scheduler(self.optimizer, config.optim, optimizer_steps)
            self.reference: Reference | None = None
            if self.found:
                seconds = self.state.seconds
                self.state = checkpoint.load(self.found, model, self.optimizer, self.scheduler)
                self.state.seconds.update(load=self.state.seconds.get("load", 0.0) + seconds.get("load", 0.0))
                if config.keeps_reference:
                    self.reference = self.found_reference()
            self.engine = make_engine(config, model, self.tokenizer, self.scale, resolve_model(config.start))
        self.trackers = trackers.Trackers(config, self.folder, self.state.step if self.found else None)
        self.folder.claim(config)
        write_rejected(self.folder.path / "rejected.jsonl", self.data.rejected)
        self.folder.rewind(self.state.step if self.found else -1)
        self.trackers.catch_up(self.folder.metrics())
        report.start(self)

    def rows_with_feedback(self) -> list[tuple[JudgeRow, int]]:
        """Training rows for the cross-entropy warm-up, one entry per feedback text."""
        pairs = [(row, i) for row in self.data.train for i in range(len(row.feedbacks))]
        if self.config.warmup.steps and not pairs:
            raise DataError(
                f"warmup.steps is {self.config.warmup.steps}, and no row of {self.config.data.train} has feedback: "
                "set warmup.steps to 0, or give feedback with the rows"
            )
        return pairs

    def run(self) -> bool:
        """The whole run. Returns False where a signal ended it before its end."""
        with self.trackers:
            self.trackers.complete = self.train()
        return self.trackers.complete

    def train(self) -> bool:
        """Warm up, train, evaluate. Returns as :meth:`run` does."""
        steps, every = self.config.train.steps, self.config.eval.every
        try:
            with self.stop:
                if not self.found:
                    if self.config.eval.on_start:
                        self.evaluate("before")
                    self.warm_up()
                    self.sync()
                    if self.config.keeps_reference:
                        self.reference = self.make_reference()
                        with self.timed("save"):
                            self.reference.save(self.folder.path)
                    self.save()  # after the reference, so that every checkpoint has one
                if self.config.warmup.steps and self.state.step == 0:
                    self.evaluate("warmup")
                with tqdm(total=steps, initial=self.state.step, desc=self.config.method, unit="step") as bar:
                    while True:
                        if every and 0 < self.state.step < steps and self.state.step % every == 0:
                            self.evaluate(f"step-{self.state.step:06d}")
                        if self.state.step >= steps:
                            break
                        metrics = self.step()
                        shown = ("reward", "score/rmse") if "reward" in metrics else ("loss", "score/rmse")
                        bar.set_postfix({name.rpartition("/")[2]: f"{metrics[name]:.3f}" for name in shown})
                        bar.update()
                        if self.should_save():
                            self.save()
                        self.stop.check()
                self.evaluate("after")
        except Stopped:
            kept = checkpoint.complete(self.folder.checkpoints)
            what = f"{kept[-1].name} is kept: go on" if kept else "no checkpoint was due yet: start over"
            print(f"stopped after step {self.state.step}; {what} with --resume", file=sys.stderr)
            return False
        with self.timed("save"):
            dtype = torch.bfloat16 if self.config.train.precision == "bf16" else torch.float32
            final = self.folder.path / "final"
            checkpoint.save_model(self.policy.model, self.tokenizer, final, self.judge_settings(), dtype)
        report.finish(self)
        return True

    def should_save(self) -> bool:
        """On the grid of save.every, at the last step, and when a signal came."""
        step, every = self.state.step, self.config.save.every
        return self.stop.requested or step == self.config.train.steps or bool(every and step % every == 0)

    def warm_up(self) -> None:
        """Cross-entropy on given feedback, so that a small model knows the format before REAL starts."""
        config = self.config.warmup
        if not config.steps:
            return
        optimizer = build_optimizer(self.policy, OptimConfig(lr=config.lr))
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=config.steps)
        order = PromptSampler(self.feedback, config.batch_size, self.config.seed)
        for step in tqdm(range(config.steps), desc="warm-up (cross-entropy)", unit="step"):
            self.stop.check()
            self.policy.train()
            with self.timed("warmup"):
                started = time.perf_counter()
                picked = order.batch(step * config.batch_size)
                groups = [given_feedback(row, [i], n, self.tokenizer, self.scale) for n, (row, i) in enumerate(picked)]
                totals = Totals.of(groups)
                loss = score_loss = 0.0
                for batch in self.micro_batches(groups):
                    out = self.policy(batch.to(self.device), supervised_objective(SFT, self.scale, totals))
                    out.loss.backward()
                    loss += float(out.loss.detach())
                    score_loss += float(out.parts["score"]) * (totals.tokens + totals.rollouts) / totals.rollouts
                lr = decay.get_last_lr()[0]
                norm, stepped = clip_and_step(self.policy, optimizer, self.config.optim.max_grad_norm)
                decay.step()
            self.log(
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

    def step(self) -> dict[str, Any]:
        """One update: sample (or take given feedback), one forward and backward pass, optimiser, sync.

        With objective.num_iterations, further passes and optimiser steps on the same rollouts follow the first.
        """
        started = time.perf_counter()
        self.seconds.clear()
        config, state = self.config, self.state
        rows: Sequence[JudgeRow] = self.sampler.batch(state.rows_seen)
        every = config.rollout.check_every
        checked = config.samples and every > 0 and state.step % every == 0

        with self.timed("rollout"):
            groups = self.rollouts(rows) if config.samples else self.given(rows)
        metrics = StepMetrics(groups, self.scale)

        with self.timed("update"):
            self.policy.train()
            totals = Totals.of(groups)
            with self.timed("pack", within="update"):
                batches = self.micro_batches(groups)
            batches = [batch.to(self.device) for batch in batches]
            references = self.references(batches)
            for batch, reference in zip(batches, references, strict=True):
                out = self.policy(batch, method_loss(config, self.scale, totals, checked, reference))
                out.loss.backward()
                metrics.add(batch, out)
            gap = metrics.engine_gap() if config.samples else None
            if gap and checked and metrics.finite:
                gap.require(config.rollout, state.step)
        lr = self.scheduler.get_last_lr()[0]
        norm = self.optimizer_step()
        for _ in range(1, config.objective.num_iterations if config.samples else 1):
            with self.timed("update"):
                for (batch, first), reference in zip(metrics.batches, references, strict=True):
                    out = self.policy(batch, method_loss(config, self.scale, totals, False, reference, first))
                    out.loss.backward()
                    metrics.add_further(out)
            self.optimizer_step()
        if config.samples:
            self.sync()

        state.step += 1
        state.rows_seen += len(rows)
        state.num_tokens += metrics.num_tokens
        state.sampled_tokens += metrics.sampled_tokens if config.samples else 0
        seconds = time.perf_counter() - started
        record = {
            "phase": config.method,
            "step": state.step,
            "epoch": state.rows_seen / len(self.data.train),
            **metrics.result(),
            **(gap.metrics() if gap else {}),
            "grad_norm": norm,
            "learning_rate": lr,
            "skipped_steps": state.skipped_steps,
            "num_tokens": state.num_tokens,
            "step_time": seconds,
            **{f"time/{phase}": s for phase, s in self.seconds.items()},
        }
        if config.samples:
            record["time/rollout_share"] = self.seconds["rollout"] / seconds
            record["time/rollout_tokens_per_second"] = metrics.sampled_tokens / self.seconds["rollout"]
        self.log(record)
        return record

    def rollouts(self, rows: Sequence[JudgeRow]) -> list[Group]:
        """Sampled feedback for the rows of a step."""
        sampling = self.sampling(self.state.step)
        rollouts = self.engine.generate([row.prompt_ids for row in rows], sampling)
        groups = [Group(n, row.prompt_ids, row.label, r) for n, (row, r) in enumerate(zip(rows, rollouts, strict=True))]
        if self.config.method == "binary_rl":
            draw_scores(groups, sampling.seed)
        return groups

    def given(self, rows: Sequence[JudgeRow]) -> list[Group]:
        """The rows of a step with their own feedback."""
        config, seen = self.config.supervised, self.state.rows_seen
        groups = []
        for n, row in enumerate(rows):
            most = config.feedbacks_per_prompt if config.feedback == "given" else 0
            picked = pick_feedback(row, most, self.config.seed, seen + n)
            groups.append(given_feedback(row, picked, n, self.tokenizer, self.scale))
        return groups

    def make_reference(self) -> Reference:
        """The policy as it is now, frozen; on its device only where every step needs it."""
        return Reference(self.policy, self.config.rollout.temperature, resident=self.config.objective.kl_coef > 0)

    def found_reference(self) -> Reference | None:
        """The reference of a resumed run; a run that only measures the KL goes on without one that it does not have."""
        reference = self.make_reference()
        try:
            reference.load(self.folder.path)
        except CheckpointError as error:
            if self.config.objective.kl_coef:
                raise
            print(f"the KL to the start is not measured: {error}", file=sys.stderr)
            return None
        return reference

    def references(self, batches: Sequence[Batch]) -> Sequence[torch.Tensor | None]:
        """The reference's log-probabilities for the micro-batches of a step that trains on, or measures, the KL."""
        done, options = self.state.step + 1, self.config.objective
        grid = options.kl_every and (done % options.kl_every == 0 or done == self.config.train.steps)
        if self.reference is None or not (options.kl_coef or grid):
            return [None] * len(batches)
        with self.timed("reference", within="update"):
            return self.reference.logprobs(batches)

    def optimizer_step(self) -> float:
        """Clip, step (or count a gradient that is not finite as skipped), go on in the schedule. Returns the norm."""
        with self.timed("optimizer"):
            norm, stepped = clip_and_step(self.policy, self.optimizer, self.config.optim.max_grad_norm)
            self.scheduler.step()
        self.state.skipped_steps += not stepped
        return norm

    def micro_batches(self, groups: Sequence[Group]) -> list[Batch]:
        """The groups of an update as batches that fit into one forward pass each."""
        train = self.config.train
        return micro_batches(groups, train.micro_batch_tokens, self.tokenizer.pad_token_id, train.shared_prompt)

    def sampling(self, step: int) -> Sampling:
        """How the rollouts of a step are sampled: a function of the seed and the step, so that a resume repeats it."""
        rollout = self.config.rollout
        return Sampling(
            n=rollout.group_size,
            max_tokens=rollout.max_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            answer=rollout.answer,
            seed=self.config.seed * 1_000_003 + step,
        )

    def sync(self) -> None:
        """Hand the policy's weights to the rollout engine."""
        with self.timed("sync"):
            self.engine.sync(self.policy.named_tensors())

    def evaluate(self, name: str) -> None:
        """Evaluate on the held-out rows; an evaluation that an interrupted run already made is kept."""
        known = self.folder.evaluation(name)
        if known is not None:
            if not any(line.get("name") == name for line in self.folder.metrics()):
                self.log({"phase": "eval", "name": name, "step": self.state.step, "eval": known})
            return
        if not self.config.samples:
            self.sync()
        with self.timed("eval"), tqdm(total=len(self.data.eval), desc=f"evaluate ({name})", unit="row") as bar:

            def progress(rows: int) -> None:
                bar.update(rows)
                self.stop.check()

            result = evaluate(
                self.engine,
                self.data.eval,
                self.scale,
                self.config.eval,
                self.config.rollout,
                self.config.seed,
                progress=progress,
                renormalize=self.config.objective.renormalize,
            )
        self.folder.save_evaluation(name, result.summary, result.predictions)
        self.log({"phase": "eval", "name": name, "step": self.state.step, "eval": result.summary})

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        with self.timed("save"):
            checkpoint.save(
                self.folder.checkpoints,
                self.policy.model,
                self.tokenizer,
                self.optimizer,
                self.scheduler,
                self.state,
                self.judge_settings(),
                self.config.save.keep,
            )

    def judge_settings(self) -> dict[str, Any]:
        """What evaluation needs to know of how the judge was trained."""
        c = self.config
        return {
            "scale": asdict(c.scale),
            "prompt": asdict(c.prompt),
            "rollout": {"answer": c.rollout.answer, "max_tokens": c.rollout.max_tokens, "top_p": c.rollout.top_p},
            "objective": {"renormalize": c.objective.renormalize},
            "eval": {"protocol": c.eval.protocol},
        }

    def log(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl, which the trackers get too."""
        self.folder.log(record)
        self.trackers.log(record)

    @contextmanager
    def timed(self, phase: str, within: str | None = None) -> Iterator[None]:
        """Add to the seconds of a phase, of the run and of the update; one within another counts for the update."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        if within is None:
            self.state.seconds[phase] = self.state.seconds.get(phase, 0.0) + seconds


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 2 for a mistake of the user's, 130 for a run that was stopped."""
    config = cli.parse(Config, "real_fast.train", "Train a judge.", None if argv is None else list(argv))
    try:
        if config.method == "tract" and config.supervised.stages == 2:
            from real_fast.methods import tract

            return 0 if tract.run(config) else 130
        return 0 if Trainer(config).run() else 130
    except KNOWN_ERRORS as error:
        print(f"real_fast.train: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped at once; the newest complete checkpoint is kept: go on with --resume", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
