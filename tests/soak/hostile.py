"""10,000 malformed lines, 1,000 files and as many answers through all that reads them, within their time and memory.

Survived is what ends in a value, or in an error for people that names the file; within a second of the processor for
a line and each thing that reads it (the better of two, since some things are made once), and within 10 s by the clock,
after which the reader is stopped; in Python's memory within 32 times its bytes, decompressed, and 16 MB; without a
score for what failed. And loading ten times the rows takes at most 15 times as long.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import resource
import signal
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from real_fast.config import PromptConfig
from real_fast.data.dataset import load_rows
from real_fast.errors import WheelMissing
from real_fast.model.smollm2 import prepare
from real_fast.prompt.builder import PromptBuilder
from tests.soak.malformed import FILES, GOOD, LINES, RARE, answer
from tests.soak.record import Found, by_kind
from tests.soak.targets import Targets
from tests.vocabularies import tokenizer_of

SECONDS = 1.0
CLOCK = 10.0  # seconds that pass: a machine that does other things too, or a reader that waits or never ends
TIMES, MORE = 32, 16_000_000
INPUTS = {"lines": 10_000, "files": 1_000, "answers of a server": 1_000}
GROWTH = 15.0  # times the seconds for ten times the rows; linear is 10
_LEAST = 0.1  # seconds of loading that a growth can be told from
_BOUND = 10_000_000  # bytes of a decompressed file that are counted


def run(folder: Path, share: float) -> Found:
    """All kinds, in turn, out of one seed; then how loading grows."""
    from transformers import AutoTokenizer

    notes = []
    model = prepare()
    tokenizers = {"smollm2": AutoTokenizer.from_pretrained(model)}
    try:
        tokenizers["mistral"] = tokenizer_of("mistral", folder / "mistral")
    except (ModuleNotFoundError, WheelMissing) as missing:
        notes.append(f"prompts with one tokenizer alone: {missing}")
    targets = Targets(tokenizers, model)
    watch = Watch()
    try:
        outcomes = [
            (kind, watch.problem(f"{kind}, seed {seed}", data, tries))
            for kind, seed, data, tries in inputs(targets, share)
        ]
        loaded = growth(folder, targets, share)
        outcomes += [(f"loading: {kind}", too_steep(kind, seconds)) for kind, seconds in loaded.items()]
    finally:
        targets.close()
    figures = watch.figures() | {"tokenizers": list(tokenizers), "seconds to load rows": loaded}
    figures["limits"] = f"{SECONDS:g} s and {TIMES} x bytes + {MORE / 1e6:g} MB, each reader by itself"
    return Found(by_kind(outcomes), figures, notes)


def inputs(targets: Targets, share: float) -> Iterator[tuple[str, int, bytes, list[Callable[[bytes], None]]]]:
    """Kind, seed, bytes, and what they go through."""
    counts = {what: round(count * share) for what, count in INPUTS.items()}
    prompts = [partial(targets.prompts, builders=[builder]) for builder in targets.builders]
    for seed in range(counts["lines"]):
        kind = list(LINES)[seed % len(LINES)]
        through = [targets.rows, prompts[seed // len(LINES) % len(prompts)], targets.verdicts, targets.lines]
        if Random(f"rare {seed}").random() < RARE.get(kind, 1):
            yield f"line: {kind}", seed, LINES[kind](Random(seed)), through
        else:
            yield "line: fields of any type", seed, LINES["fields of any type"](Random(seed)), through
    for seed in range(counts["files"]):
        kind = list(FILES)[seed % len(FILES)]
        endings, make = FILES[kind]
        rng = Random(seed)
        yield f"file: {kind}", seed, make(rng), [partial(targets.file, rng.choice(endings))]
    for seed in range(counts["answers of a server"]):
        yield "answer of a server", seed, answer(Random(seed)), [targets.answers]


class Watch:
    """Runs readers within limits, and keeps the most that each took."""

    def __init__(self) -> None:
        self.slowest: dict[str, tuple[float, str]] = {}
        self.largest: dict[str, tuple[float, str]] = {}
        self.before = _resident()

    def problem(self, what: str, data: bytes, tries: list[Callable[[bytes], Any]]) -> str | None:
        """What went wrong with an input, None for nothing."""
        size = max(len(data), _unpacked(data))
        for read in tries:
            name = getattr(read, "func", read).__name__
            try:
                seconds = _seconds(read, data)
                if seconds > SECONDS:
                    seconds = min(seconds, _seconds(read, data))
                tracemalloc.start()
                with within(6 * CLOCK):  # each allocation is noted
                    read(data)
                peak = tracemalloc.get_traced_memory()[1]
            except TooLong as late:
                return f"{what}, {name}: {late} for {len(data)} bytes: {data[:100]!r}"
            except Exception as error:  # whatever a reader raises is what is looked for
                return f"{what}, {name}: {type(error).__name__}: {str(error)[:300]}"
            finally:
                tracemalloc.stop()
            self.slowest[name] = max(self.slowest.get(name, (0.0, "")), (seconds, what))
            self.largest[name] = max(self.largest.get(name, (0.0, "")), ((peak - MORE) / size if size else 0.0, what))
            if seconds > SECONDS:
                return f"{what}, {name}: {seconds:.2f} s for {len(data)} bytes"
            if peak > TIMES * size + MORE:
                return f"{what}, {name}: {peak / 1e6:.1f} MB for {size} bytes"
        return None

    def figures(self) -> dict[str, Any]:
        """For the report."""
        return {
            "slowest": {name: f"{seconds:.3f} s ({what})" for name, (seconds, what) in self.slowest.items()},
            f"most memory above {MORE / 1e6:g} MB, times the bytes": {
                name: f"{times:.1f} ({what})" for name, (times, what) in self.largest.items()
            },
            "resident memory, growth (MB)": round((_resident() - self.before) / 1e6),
        }


def _seconds(read: Callable[[bytes], Any], data: bytes) -> float:
    start = time.process_time()
    with within(CLOCK):
        read(data)
    return time.process_time() - start


class TooLong(BaseException):
    """A reader was stopped. No Exception, so that no reader takes it for an error of its data."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Stop what takes longer by the clock, in the main thread. Raises :class:`TooLong`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"not done after {seconds:g} s by the clock")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again, where the first was lost in a finalizer
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def growth(folder: Path, targets: Targets, share: float) -> dict[str, dict[str, float]]:
    """Seconds of the processor for loading 10,000 and 100,000 rows of several kinds."""
    builder = PromptBuilder(PromptConfig(template="short"), targets.finder.spelling.tokenizer, targets.scale)
    kinds: dict[str, Callable[[int], dict[str, Any]]] = {
        "rows of their own": lambda i: GOOD | {"id": str(i), "instruction": f"Name fruit {i}."},
        "equal rows and ids": lambda i: GOOD,
        "refused rows": lambda i: {"id": "a", "score": 9},
    }
    sizes = [round(n * share) for n in (10_000, 100_000)]
    found: dict[str, dict[str, float]] = {}
    for name, make in kinds.items():
        for rows in sizes:
            path = folder / "many.jsonl"
            with path.open("wb") as file:
                file.writelines(_line(make(i)) for i in range(rows))
            start = time.process_time()
            load_rows(str(path), "train", builder, targets.scale, 2048, [])
            found.setdefault(name, {})[str(rows)] = round(time.process_time() - start, 2)
    return found


def too_steep(kind: str, seconds: dict[str, float]) -> str | None:
    """What is wrong with the seconds for some rows and for ten times as many; None for nothing."""
    few, many = seconds.values()
    if many <= GROWTH * max(few, _LEAST):
        return None
    return f"{kind}: {few} s and {many} s of the processor for {' and '.join(seconds)} rows"


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _unpacked(data: bytes) -> int:
    """Bytes that a compressed file stands for, as far as it can be read; 0 for another one."""
    size = 0
    for unpack in (gzip.open, bz2.open, lzma.open):
        try:
            with unpack(io.BytesIO(data)) as file:
                while size < _BOUND and (part := len(file.read(65536))):
                    size += part
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error):
            continue
    return size


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
