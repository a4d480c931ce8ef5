"""The command that grades rows: a JSON line in, the same line with its grade out, in order.

python -m real_fast.judge --model runs/x/final < rows.jsonl > graded.jsonl
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, Literal

from real_fast.config import PromptConfig, RolloutConfig, ScaleConfig
from real_fast.data.readers import jsonl_records, open_binary
from real_fast.errors import ConfigError, DataError, UserError, run_command
from real_fast.judging.grade import Grade
from real_fast.judging.judge import Judge
from real_fast.judging.lines import RAW, Grader, grade_lines
from real_fast.model import judge_settings
from real_fast.runs import log
from real_fast.runs.progress import progress_bar
from real_fast.utils.seeds import call_seed

PROG = "real_fast.judge"


@dataclass
class JudgeConfig:
    """Grade JSON lines from standard input (or a file); write them to standard output, each with its grade.

    Args:
        model: A folder or a model on the Hugging Face hub. Of a folder that real_fast.train wrote, scale, prompt,
            answer and protocol are taken over; flags override them.
        data: A .jsonl or .jsonl.gz file in place of standard input.
        n: Feedbacks sampled per row; their score distributions are averaged.
        temperature: Sampling temperature of the feedback; 0 for greedy.
        protocol: How a score comes about. "real": the score distribution behind the phrase that the model wrote, or as
            rollout.answer says where it wrote none; "tract": the feedback is cut where the phrase begins, and the
            phrase is appended; "raft": no feedback, the score is read right behind the phrase; "decode": the mean of
            the scores that the model wrote itself.
        key: The field that a grade is written to; rows must not have it yet.
        batch_size: Rows graded and written at a time.
        seed: The same rows, seed and batch_size give the same samples.
        precision: Number format of the weights: "bf16", "fp32", or "auto", which is what is fast here.
        device: "auto" takes CUDA where there is one.
        trust_remote_code: Run Python code that comes with the model.
        renormalize: Softmax over the score tokens alone instead of over the whole vocabulary.
        scale: The score scale.
        prompt: How a row becomes a prompt.
        rollout: Sampling of feedback: engine, max_tokens, top_p, answer, and the engine's limits are used.
    """

    model: str = ""
    data: str = ""
    n: int = 1
    temperature: float = 1.0
    protocol: Literal["real", "tract", "raft", "decode"] = "real"
    key: str = "grade"
    batch_size: int = 64
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trust_remote_code: bool = False
    renormalize: bool = False
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    rollout: RolloutConfig = field(
        default_factory=lambda: RolloutConfig(gpu_memory_utilization=judge_settings.GPU_SHARE)
    )

    def check(self) -> None:
        """Raise :class:`ConfigError` for settings that cannot work; the judge checks the others."""
        if not self.model:
            raise ConfigError("model is not set: give --model or put it into the config file")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}: it must be 1 or more")
        for name, own in (("temperature", "temperature"), ("group_size", "n")):
            if getattr(self.rollout, name) != getattr(RolloutConfig(), name):
                raise ConfigError(f"rollout.{name} is for training: give --{own}, which is the judge's")
        if not self.key or self.key == RAW:
            raise ConfigError(f"key is {self.key!r}: give another name for the field that a grade is written to")

    def judge(self) -> Judge:
        """Load the judge."""
        return Judge(
            self.model,
            scale=self.scale,
            engine=self.rollout.engine,
            n=self.n,
            temperature=self.temperature,
            protocol=self.protocol,
            prompt=self.prompt,
            rollout=self.rollout,
            renormalize=self.renormalize,
            precision=self.precision,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass
class Done:
    """What became of the rows: all, those without a score, those with a warning; where the first of each is and why."""

    rows: int = 0
    failed: int = 0
    first_failure: str = ""
    doubted: int = 0
    first_doubt: str = ""

    def count(self, line: int, grade: Grade) -> None:
        """Add the row of a line."""
        self.rows += 1
        if grade.error:
            self.failed += 1
            self.first_failure = self.first_failure or f"line {line}: {grade.error}"
        if grade.warning:
            self.doubted += 1
            self.first_doubt = self.first_doubt or f"line {line}: {grade.warning}"

    def __str__(self) -> str:
        found = [f"{self.rows - self.failed} of {self.rows} rows graded"]
        if self.failed:
            found.append(f"first without: {self.first_failure}")
        if self.doubted:
            found.append(f"{self.doubted} with a warning, first: {self.first_doubt}")
        return "; ".join(found)


def run(config: JudgeConfig, source: IO[bytes], out: IO[bytes], load: Callable[[], Grader]) -> Done:
    """Grade every line of `source` into `out`, batch by batch, with a progress bar on stderr.

    Raises:
        ConfigError: Rows of the first batch have the field that grades go to; nothing has been loaded or written then.
    """
    total = _lines_left(source)
    records = jsonl_records(source)
    batches = iter(lambda: list(islice(records, config.batch_size)), [])
    first = next(batches, [])
    for line, record in first:
        if isinstance(record, dict) and config.key in record:
            raise ConfigError(f"line {line} has a field {config.key!r} already: choose another name with --key")
    done = Done()
    if not first:
        return done
    judge = load()
    with progress_bar("grade", total, "row") as bar:
        for number, batch in enumerate(chain([first], batches)):
            found = list(grade_lines(judge, batch, config.key, call_seed(config.seed, number)))
            for (line, _), (data, grade) in zip(batch, found, strict=True):
                out.write(data)
                done.count(line, grade)
            out.flush()
            bar.set_postfix(failed=done.failed, refresh=False)
            bar.update(len(batch))
    return done


def _lines_left(source: IO[bytes]) -> int | None:
    """Lines that are not blank, where they can be counted beforehand: in a file, not in a pipe."""
    if not source.seekable():
        return None
    start = source.tell()
    count = sum(1 for line in source if line.strip())
    source.seek(start)
    return count


@contextmanager
def results_alone() -> Iterator[IO[bytes]]:
    """Give what standard output was; what libraries print meanwhile goes to standard error, out of the results."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr), os.fdopen(os.dup(kept), "wb") as out:
            yield out
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def _source(data: str) -> Iterator[IO[bytes]]:
    if not data:
        if sys.stdin.isatty():
            print("waiting for JSON lines on standard input (--data FILE reads a file)", file=sys.stderr)
        yield sys.stdin.buffer
        return
    path = Path(data).expanduser()
    if not path.name.lower().endswith((".jsonl", ".jsonl.gz")):
        raise DataError(f"data {data}: give a .jsonl or .jsonl.gz file, one JSON object a line")
    try:
        file = open_binary(path)
    except OSError as error:
        raise DataError(f"data {data}: cannot be read: {error.strerror or error}") from error
    with file:
        yield file


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        0 where any row has a score (how many have none is said on stderr), 1 where none has or nobody reads the results
        any more, 2 for a mistake of the user's, 130 for Ctrl-C.
    """
    log.set_up()
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(PROG, lambda: _main(arguments), "stopped; every batch that was finished has been written")


def _main(argv: list[str]) -> int:
    config: JudgeConfig = judge_settings.parse(JudgeConfig, PROG, "Grade rows.", argv)
    config.check()
    try:
        with results_alone() as out, ExitStack() as judges, _source(config.data) as source:
            done = run(config, source, out, lambda: judges.enter_context(config.judge()))
    except BrokenPipeError:
        print("stopped: nobody reads the results any more", file=sys.stderr)
        return 1
    except UserError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"reading the rows or writing the results failed: {error}") from error
    print(done, file=sys.stderr)
    return 1 if done.rows and done.failed == done.rows else 0


if __name__ == "__main__":
    sys.exit(main())
