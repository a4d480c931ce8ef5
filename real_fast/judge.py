"""The command that grades rows: a JSON line in, the same line with its grade out, in order.

real-fast judge --model runs/x/final < rows.jsonl > graded.jsonl
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO

from real_fast.commands import run as run_command

if __name__ == "__main__":  # before what takes seconds to import
    sys.exit(run_command("judge"))

from real_fast.config.commands import JudgeConfig
from real_fast.data.readers import jsonl_records, open_binary
from real_fast.errors import ConfigError, DataError, OutputError, UserError, remedy
from real_fast.judging.grade import Grade
from real_fast.judging.judge import Judge
from real_fast.judging.lines import RAW, Grader, grade_lines
from real_fast.runs.progress import progress_bar
from real_fast.utils.seeds import call_seed


def load_judge(config: JudgeConfig) -> Judge:
    """Load the judge of these settings."""
    return Judge(
        config.model,
        scale=config.scale,
        engine=config.rollout.engine,
        n=config.n,
        temperature=config.temperature,
        protocol=config.protocol,
        prompt=config.prompt,
        rollout=config.rollout,
        renormalize=config.renormalize,
        precision=config.precision,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
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
            for (line, _), (_, grade) in zip(batch, found, strict=True):
                done.count(line, grade)
            _write(out, b"".join(data for data, _ in found))
            bar.set_postfix(failed=done.failed, refresh=False)
            bar.update(len(batch))
    return done


def _write(out: IO[bytes], data: bytes) -> None:
    try:
        out.write(data)
        out.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"the results cannot be written to standard output: {remedy(error)}") from error


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
        out = os.fdopen(os.dup(kept), "wb")
        try:
            with redirect_stdout(sys.stderr):
                yield out
        finally:
            with suppress(OSError):  # of what could not be written, which has been said
                out.close()
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
    return run_command("judge", argv)


def work(config: JudgeConfig) -> int:
    """What the command does. Returns the exit status, as :func:`main` says."""
    config.check()
    if not config.key or config.key == RAW:
        raise ConfigError(f"key is {config.key!r}: give another name for the field that a grade is written to")
    try:
        with results_alone() as out, ExitStack() as judges, _source(config.data) as source:
            done = run(config, source, out, lambda: judges.enter_context(load_judge(config)))
    except BrokenPipeError:  # nobody reads the results any more
        return 1
    except UserError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data {config.data or 'on standard input'}: reading the rows failed: {error}") from error
    print(done, file=sys.stderr)
    return 1 if done.rows and done.failed == done.rows else 0
