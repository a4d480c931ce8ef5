"""Host time of an update: ``python -m benchmarks.host_time [NAME]``, into results/host_time.json.

The trainer's own step at 256 prompts of 8 rollouts, with an engine, a model and an optimiser that take no time of their
own: what is left is what a device waits for while Python works. No device is needed, and the model's size does not
matter. Ids are as frequent as words are in a text, so that what is looked up by them lies in the caches as often.

Times are the process's own on one thread, whatever else the machine does; a part's does not hold that of the parts
inside it. The medians of some steps are kept under NAME, beside those of other names.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.machine import machine
from benchmarks.random_model import byte_tokenizer
from benchmarks.record import RESULTS
from real_fast.attention.interface import prepare
from real_fast.config import Config
from real_fast.data.sampler import PromptSampler
from real_fast.distributed.world import ALONE
from real_fast.methods import policy_gradient
from real_fast.methods.base import LossOutput, UpdateCounts
from real_fast.methods.real import Real
from real_fast.rollout.assemble import build_rollout
from real_fast.runs.checkpoint import TrainState
from real_fast.runs.folder import RunFolder
from real_fast.runs.run import Run
from real_fast.runs.trackers import Trackers
from real_fast.score.phrase import PhraseFinder, parse_sample
from real_fast.score.scale import ScoreScale
from real_fast.train import Trainer
from real_fast.training.groups import GroupSource
from real_fast.training.peak_memory import PeakMemory
from real_fast.training.step_metrics import StepMetrics
from real_fast.training.timer import Timer
from real_fast.training.update import Updater
from real_fast.types import Batch, JudgeRow, Rollout, SamplingParams

FILE = RESULTS / "host_time.json"
NAME = "as it is"
PROMPTS, K, P, R = 256, 8, 1200, 250
# Eight groups to a micro-batch.
BUDGET = 25_600
STEPS = 5
VOCABULARY = 151_936
MODEL = "model"  # what a real run does not spend on the host
ENGINE = "rollouts put together"
PARTS = (
    ENGINE,
    "rollouts checked",
    "counted",
    "packed",
    "segments laid out",
    "outputs kept",
    "engine and trainer compared",
    "metrics",
    "logged",
    "the rest",
)


class Stopwatch:
    """Seconds by part; those of a part inside another count for the inner one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = time.process_time()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count what happens inside."""
        self._add()
        self._open.append(part)
        try:
            yield
        finally:
            self._add()
            self._open.pop()

    def _add(self) -> None:
        now = time.process_time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def around(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The same call, counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self(part):
                return call(*args, **kwargs)

        return counted


class Engine:
    """Puts rollouts together as every engine does, of ids and log-probabilities that are there already."""

    name, vocabulary, beside_training, held_bytes = "none", VOCABULARY, False, 0
    dtype = takes = torch.bfloat16

    def __init__(self, tokenizer: Any, scale: ScoreScale, prompts: int, k: int, r: int) -> None:
        self.tokenizer, self.scale = tokenizer, scale
        self.finder, self.eos_ids = PhraseFinder(tokenizer, scale), frozenset({int(tokenizer.eos_token_id)})
        draw, words = Random(0), r - len(scale.phrase_ids)
        self.samples = [
            [*_ids(draw, words), *scale.phrase_ids, draw.choice(scale.score_ids)] for _ in range(prompts * k)
        ]
        self.logprobs = [[-draw.random() for _ in ids] for ids in self.samples]
        self.scores = [-1.7] * len(scale.values)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Rollout]]:
        """As engines do."""
        made = []
        for ids, logprobs in zip(self.samples, self.logprobs, strict=True):
            parsed = parse_sample(ids, self.eos_ids, self.finder, sampling.answer)
            made.append(build_rollout(self.finder, ids, logprobs, parsed, list(self.scores), sampling.texts))
        return [made[at : at + sampling.n] for at in range(0, len(made), sampling.n)]

    def sync_adapters(self, model: Any) -> None:
        """Nothing is handed over."""

    sync = sync_adapters

    def sleep(self) -> bool:
        """It does not."""
        return False

    def close(self) -> None:
        """Nothing is held."""


class Model(torch.nn.Module):
    """A policy that makes up its outputs, and lays segments out as attention on a GPU needs them."""

    device = torch.device("cpu")

    def __init__(self, clock: Stopwatch) -> None:
        super().__init__()
        self.clock, self.model = clock, torch.nn.Module()

    def begin_step(self) -> None:
        """Nothing is cast."""

    end_step = begin_step

    def forward(self, batch: Batch, _: Any) -> LossOutput:
        """Outputs of the right shapes."""
        assert batch.layout is not None
        with self.clock("segments laid out"):
            batch.layout.longest, prepare(batch.layout, "varlen", self.device)
        m, one = len(batch.labels), torch.zeros((), requires_grad=True)
        scores = torch.full((m, 8), 0.5).normal_().log_softmax(1)[:, :5]
        expected = scores.exp() @ torch.arange(1.0, 6.0)
        logprobs, computed = -torch.rand(len(batch.targets)), torch.ones(len(batch.targets), dtype=torch.bool)
        parts = {"exploration": torch.zeros(()), "refinement": torch.zeros(())}
        return LossOutput(1.0 * one, scores, expected, logprobs, computed, parts, torch.randn(m), torch.randn(m))


class NoOptimizer(Updater):
    """Micro-batches alone."""

    def step(self) -> None:
        """Takes no step."""
        self.idle.step(True)


class HostStep(Trainer):
    """A trainer whose engine, model and optimiser are those above."""

    def __init__(self, folder: Path, clock: Stopwatch, prompts: int, k: int, p: int, r: int) -> None:
        self.config = config = _config(folder, prompts, k, r)
        tokenizer = byte_tokenizer(VOCABULARY)
        scale = ScoreScale.from_tokenizer(tokenizer, config.scale.values, config.scale.phrase)
        draw = Random(1)
        rows = [
            JudgeRow(str(n), str(n), "", "", "", "", draw.choice(scale.values), [], [], _ids(draw, p))
            for n in range(prompts)
        ]
        self.world, self.state = ALONE, TrainState()
        self.timer = Timer(self.state.seconds)
        self.method, self.policy = Real(config, lambda _: [], scale), Model(clock)  # type: ignore[assignment]
        nothing: Any = None
        self.updater = NoOptimizer(
            self.policy, nothing, nothing, config.optim, config.train, 0, ALONE, self.timer, self.state
        )
        self.engine = Engine(tokenizer, scale, prompts, k, r)
        memory, sampler = PeakMemory(torch.device("cpu")), PromptSampler(rows, prompts, config.seed)
        self.groups = GroupSource(self.method, sampler, self.engine, self.timer, memory, config.rollout.check_every)
        run_folder = RunFolder(config)
        self.run = Run(run_folder, Trackers(config, run_folder, None))
        self.run.claim(config, None)
        self.parts = SimpleNamespace(scale=scale, tokenizer=tokenizer, data=SimpleNamespace(train=rows))  # type: ignore[assignment]

    @cached_property
    def places(self) -> tuple[tuple[Any, str, str], ...]:
        """Whose calls are which part."""
        return (
            (self.engine, "generate", ENGINE),
            (policy_gradient, "sample", "rollouts checked"),
            (UpdateCounts, "of", "counted"),
            (self.updater, "micro_batches", "packed"),
            (self.policy, "forward", MODEL),
            (StepMetrics, "add", "outputs kept"),
            (StepMetrics, "compare_engine", "engine and trainer compared"),
            (StepMetrics, "result", "metrics"),
            (self.run, "log", "logged"),
            (self.run, "log_rollouts", "logged"),
        )


def _config(folder: Path, prompts: int, k: int, r: int) -> Config:
    config = Config(model="none", output=str(folder / "run"), report_to=[])
    # The comparison's limits are of engines that sample; here every number is made up.
    config.rollout = replace(
        config.rollout, prompts_per_step=prompts, group_size=k, max_tokens=r + 1, check_logprob=1e9, check_score=1e9
    )
    config.train = replace(config.train, micro_batch_tokens=BUDGET)
    config.objective = replace(config.objective, kl_every=0)
    return config


def _ids(draw: Random, count: int) -> list[int]:
    """Words, as often as in a text (Zipf's law), and none of the bytes that the phrase is made of."""
    first, words = 300, VOCABULARY - 300
    return [first - 1 + int(words ** draw.random()) for _ in range(count)]


def measure(prompts: int = PROMPTS, k: int = K, p: int = P, r: int = R, steps: int = STEPS) -> dict[str, float]:
    """Milliseconds by part of an update in which all that comes now and then is due; the first is not counted."""
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        clock = Stopwatch()
        trainer = HostStep(Path(folder), clock, prompts, k, p, r)
        for owner, name, part in trainer.places:
            stack.enter_context(patch.object(owner, name, clock.around(getattr(owner, name), part)))
        for _ in range(steps + 1):
            trainer.state.step = 0
            clock.seconds.clear()
            with clock(PARTS[-1]):
                trainer.step()
            found.append({part: 1e3 * clock.seconds[part] for part in PARTS})
    return {part: statistics.median(one[part] for one in found[1:]) for part in PARTS}


def main(argv: Sequence[str]) -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    parts = measure()
    for part, milliseconds in (parts | {"all": sum(parts.values())}).items():
        print(f"{part:30} {milliseconds:8.1f} ms")
    name = argv[0] if argv else NAME
    line = {"name": name, **machine(), "case": f"K={K} P={P} R={R} prompts={PROMPTS}", "parts": parts}
    kept = json.loads(FILE.read_text("utf-8")) if FILE.is_file() else []
    kept = [one for one in kept if one["name"] != name] + [line]
    FILE.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
