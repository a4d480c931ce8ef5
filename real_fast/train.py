"""real-fast train: train a judge by REAL (arXiv 2603.17145), or by one of the methods that it is compared with."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from real_fast.commands import run

if __name__ == "__main__":  # before what takes seconds to import
    sys.exit(run("train"))

from real_fast.config import Config
from real_fast.config.debug import smaller
from real_fast.distributed.ranks import joined
from real_fast.distributed.world import ALONE, World
from real_fast.methods.base import LossOutput, Trained, UpdateCounts
from real_fast.methods.registry import check_config
from real_fast.reports import report
from real_fast.runs import log
from real_fast.runs.lock import alone_in
from real_fast.runs.progress import progress_bar
from real_fast.runs.stop import Stopped, StopSignal
from real_fast.training.debug import Profile, debugging
from real_fast.training.held_out import already_made, evaluate_held_out
from real_fast.training.rollout_log import rollout_lines
from real_fast.training.setup import build, settled
from real_fast.training.step_metrics import StepMetrics
from real_fast.training.warmup import warm_up
from real_fast.types import Group


class Trainer:
    """One run of one method. training/setup.py builds the parts; this file is the order in which they act."""

    def __init__(self, config: Config, world: World = ALONE) -> None:
        self.config = config = settled(config, world)
        self.parts = p = build(config, world)
        self.world, self.state, self.timer, self.run = p.world, p.state, p.timer, p.run
        self.method, self.policy, self.updater, self.groups = p.method, p.policy, p.updater, p.groups
        self.stop = StopSignal(world)

    def fit(self) -> bool:
        """The whole run. Returns False where a signal ended it before its end."""
        with self.run, self.groups, debugging(self.config.debug):
            try:
                with self.parts.saver, self.stop:  # a checkpoint that is being written is waited for
                    self.train()
            except Stopped:
                self.run.stopped(self.state.step)
                return False
            self.finish()
            self.run.complete()
        return True

    def train(self) -> None:
        """Warm up, then update, save and evaluate in turn."""
        config, state = self.config, self.state
        if not self.parts.resume_from:
            self.begin()
        if config.warmup.steps and state.step == 0:
            self.evaluate("warmup")
        profile = Profile(config.profile if self.world.is_main else 0, self.run.folder.path, self.policy.device)
        with progress_bar(self.method.name, config.train.steps, "step", state.step) as bar, profile:
            while True:
                if 0 < state.step < config.train.steps and self.due(config.eval.every):
                    self.evaluate(f"step-{state.step:06d}")  # its checkpoint has been written before
                if state.step >= config.train.steps:
                    break
                report.advance(bar, self.step())
                profile.step()
                self.stop.give_up(self.updater.idle.end())
                stopping = self.stop.requested
                if stopping or state.step == config.train.steps or self.due(config.save.every):
                    self.save()
                if stopping:
                    raise self.stop.reason
        self.updater.idle.check_run(state.step or config.warmup.steps)
        self.evaluate("after")

    def due(self, every: int) -> bool:
        """Whether something that comes every so many updates comes now; 0 is never."""
        return every > 0 and self.state.step % every == 0

    def begin(self) -> None:
        """Evaluate, warm up, freeze the reference policy, write the first checkpoint."""
        p, config = self.parts, self.config
        if config.eval.on_start:
            self.evaluate("before")
        if config.warmup.steps:
            warm_up(self.updater, p.sft_order, config.warmup, p.encode_feedback, p.scale, self.run.log, self.stop.check)
        self.groups.publish()
        self.method.begin(self.policy, self.run.folder.path, self.world)
        self.save()  # after the reference policy, so that every checkpoint has one

    def step(self) -> dict[str, Any]:
        """One update: sample (or take given feedback), forward and backward, optimiser, sync. Returns its metrics."""
        self.timer.start_update()
        shown = self.config.rollout.log_prompts if self.due(self.config.rollout.log_every) else 0
        groups = self.groups.next(self.state, self.policy)
        metrics = StepMetrics(groups, self.parts.scale, self.world)
        self.update(groups, metrics)
        self.groups.publish()
        sampled = metrics.sampled_tokens if self.method.uses_rollouts else None
        self.state.advance(len(groups), metrics.num_tokens, sampled or 0)
        times = self.timer.metrics(sampled) | self.groups.metrics()  # before the metrics wait for the device
        record = {
            "phase": self.method.name,
            "step": self.state.step,
            "epoch": self.state.rows_seen / len(self.parts.data.train),
            **metrics.result(),
            **self.updater.metrics(),
            "num_tokens": self.state.num_tokens,
            **times,
        }
        self.run.log(record)
        self.run.log_rollouts(rollout_lines(metrics, self.state.step, shown, self.parts.scale, self.parts.tokenizer))
        return record

    def update(self, groups: Sequence[Group], metrics: StepMetrics) -> None:
        """The optimiser steps on one batch of groups; further ones, if any, keep the advantages of the first."""
        compare = self.groups.compares(self.state.step)
        counts = UpdateCounts.of(groups)  # of all ranks: the loss does not depend on how groups are spread
        with self.timer("update"):
            self.policy.train()
            batches = self.updater.micro_batches(groups)
            if self.method.prepares(self.state.step):
                with self.timer("reference", within="update"):
                    self.method.prepare(batches)
        old: list[LossOutput | None] = [None] * len(batches)
        for iteration in range(self.method.iterations):
            with self.timer("update"):
                for i, batch in enumerate(batches):
                    with self.updater.accumulate(last=i == len(batches) - 1):
                        out = self.policy(batch, self.method.loss(counts, old[i], compare and iteration == 0))
                        out.loss.backward()
                    old[i] = metrics.add(batch, out, iteration)
                if compare and iteration == 0:  # elsewhere the metrics do it, when nothing waits for them
                    gap = metrics.compare_engine()
                    if metrics.finite:
                        self.groups.check(gap, self.config.rollout, self.state.step)
            self.updater.step()  # clip, skip what is not finite, optimiser, schedule

    def evaluate(self, name: str) -> None:
        """Evaluate on the held-out rows; an evaluation that an interrupted run already made is kept."""
        p, step = self.parts, self.state.step
        if self.world.main(self.world.is_main and already_made(name, step, self.run)):
            return
        with self.groups.awake(self.policy), self.timer("eval"):
            evaluate_held_out(name, step, p.run, p.groups.engine, p.data.eval, p.scale, self.config, self.stop.check)

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        files = self.groups.files()
        with self.timer("save"):
            self.parts.saver.checkpoint(self.state, files)

    def finish(self) -> None:
        """Write final/, summary.json and the report."""
        p, name = self.parts, self.groups.engine.name
        with self.timer("save"):
            p.saver.final()
        if self.world.is_main:
            report.finish(self.run.folder, self.config, self.state, p.data, name, self.policy.device)


def train(config: Config, world: World = ALONE) -> bool:
    """All stages of the method. Returns False where a signal ended it before its end. Raises :class:`UserError`."""
    done: Trained | None = None
    with world.together():  # what is wrong everywhere is said once
        stages = check_config(config).stages(config, world)
    with alone_in(config.output, world), closing(stages):  # and with them stage 1's lock
        while True:
            try:
                stage = stages.send(done)
            except StopIteration:
                return True
            trainer = Trainer(stage, world)
            if not trainer.fit():
                return False
            trainer.groups.catch_up(trainer.policy)
            p = trainer.parts
            done = Trained(p.groups.engine, p.data, p.scale, p.run.folder.path)
            del trainer, p  # and with them the optimiser, before the next stage has one


def work(config: Config) -> int:
    """What the command does. Returns the exit status: 130 for a run that was stopped."""
    config = smaller(config) if config.debug else config
    with joined(config.train.device, config.train.replicas, config.rollout.timeout) as world:
        log.set_up(config.log_level, world.is_main)  # smaller's, which shows more
        return 0 if train(config, world) else 130


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 2 for a mistake of the user's, 130 for a run that was stopped."""
    return run("train", argv)
