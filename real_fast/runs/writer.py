"""Writes folders by all ranks together, whole or not at all, in a thread while training goes on; one at a time."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from real_fast.distributed.world import ALONE, World
from real_fast.errors import CheckpointError, ElsewhereError
from real_fast.runs.parts import Contents, Part, Shares, TensorFile, file_name, files_of
from real_fast.runs.sealed import publish, seal
from real_fast.utils.machine import available_memory

logger = logging.getLogger(__name__)
Background = Literal["auto", "always", "never"]
# Of the host's free memory, what a copy may take: where training itself is in there, and where it is on a GPU.
_SHARE_CPU, _SHARE_GPU = 0.25, 0.75


class FolderWriter:
    """What a run writes its checkpoints and its results with. All ranks call its methods, in the same order.

    A folder's tensors are copied to the host's memory, each by the rank that writes it, before :meth:`write` returns.

    Args:
        world: The ranks.
        background: ``save.background``.
        device: Where the weights are.
    """

    def __init__(
        self, world: World = ALONE, background: Background = "auto", device: torch.device | None = None
    ) -> None:
        self.world, self.background = world, background
        self.device = device or torch.device("cpu")
        self._job: _Job | None = None
        self._gather: Callable[[Any], list[Any]] = world.beside("saving").gather
        self._said = False

    def write(
        self, target: Path, contents: Contents, advice: Callable[[], str], done: Callable[[], None] = lambda: None
    ) -> None:
        """Begin to write a folder, after the one before is written.

        Args:
            target: The folder to make or replace.
            contents: What goes into it; it may change as soon as this returns.
            advice: What to do about a disk that fails, asked for when it has failed.
            done: Called on the main process when the folder is in its place.

        Raises:
            CheckpointError: The disk is full or read-only: of this folder, or of the one before; a half-written folder
                is removed. On ranks that did not fail themselves, ElsewhereError.
        """
        self.wait()
        temporary = target.with_name(f"{target.name}.tmp")
        with self.world.together():
            if self.world.is_main:
                self._begin(target, temporary, contents, advice)
        background = self._in_background(contents)
        self._job = job = _Job(target, temporary, self.world, self._gather, advice, done, background)
        copy = background or self.device.type != "cpu"
        try:
            shares = Shares(self.world.size)
            with torch.no_grad():
                for part in contents.parts:
                    files = files_of(part, shares, self.world.rank, self.world.size, copy)
                    job.counts[part.stem] = job.take(files)
        except BaseException as error:
            job.give_up(f"{type(error).__name__}: {error}")
            self._job = None  # the others may never come to the end, where the threads meet
            if self.world.size == 1:
                job.wait()
            raise
        job.end()
        if not background:
            self.wait()

    def wait(self) -> None:
        """Return when what was begun is in its place. Raises as :meth:`write` does, once."""
        job, self._job = self._job, None
        if job is not None:
            job.wait()
            if job.error is not None:
                raise job.error

    def _begin(self, target: Path, temporary: Path, contents: Contents, advice: Callable[[], str]) -> None:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            contents.small(temporary)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"{target} could not be written: {error}; {advice()}") from error

    def _in_background(self, contents: Contents) -> bool:
        """Whether training goes on meanwhile; the same on all ranks."""
        if self.background != "auto":
            return self.background == "always"
        free = available_memory()
        ranks_here = min(self.world.size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        copies = ranks_here * sum(part.nbytes for part in contents.parts)
        share = _SHARE_CPU if self.device.type == "cpu" else _SHARE_GPU
        fits = self.world.all(free is not None and copies <= share * free)
        if not fits and not self._said and free is not None:
            self._said = True
            logger.info(
                "checkpoints are written while training waits: a copy takes %.1f GB of the %.1f GB of host memory that "
                "are free (save.background)",
                copies / 1e9,
                free / 1e9,
            )
        return fits


class _Job:
    """One folder: this rank's files, and on the main process what makes the folder whole.

    Args:
        target: The folder.
        temporary: Where it is written.
        world: The ranks.
        gather: Between their threads.
        advice: As :meth:`FolderWriter.write`.
        done: The same.
        background: Take every file at once; otherwise, one waits while another is written.
    """

    def __init__(
        self,
        target: Path,
        temporary: Path,
        world: World,
        gather: Callable[[Any], list[Any]],
        advice: Callable[[], str],
        done: Callable[[], None],
        background: bool,
    ) -> None:
        self.target, self.temporary, self.gather = target, temporary, gather
        self.rank, self.size = world.rank, world.size
        self.advice, self.done = advice, done
        self.counts: dict[str, list[int]] = {}
        self.error: CheckpointError | ElsewhereError | None = None
        self._files: Queue[TensorFile | str | None] = Queue(0 if background else 1)
        self._thread = threading.Thread(target=self._run, name=f"write {target.name}", daemon=True)
        self._thread.start()

    def take(self, files: Any) -> list[int]:
        """Write these files; returns how many each rank has."""
        while True:
            try:
                self._files.put(next(files))
            except StopIteration as end:
                counts: list[int] = end.value
                return counts

    def end(self) -> None:
        """There are no more files."""
        self._files.put(None)

    def give_up(self, reason: str) -> None:
        """The folder cannot be written."""
        self._files.put(reason)

    def wait(self) -> None:
        """Return when everything is done; what went wrong is in `error`."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._write()
        except Exception as error:  # another rank is gone, with whatever error its connection gives
            self.error = self._told({self.rank: f"{type(error).__name__}: {error}"})
            self.error.__cause__ = error

    def _write(self) -> None:
        mine = self._write_files()
        answers: list[_Written] = self.gather(mine)
        failed = {rank: written.problem for rank, written in enumerate(answers) if written.problem}
        problem = None
        if self.rank == 0:
            problem = None if failed else self._complete(answers)
            if failed or problem:
                shutil.rmtree(self.temporary, ignore_errors=True)
        behind = self.gather(problem)  # all end when it is in its place, or gone
        failed |= {rank: problem for rank, problem in enumerate(behind) if problem}
        if failed:
            self.error = self._told(failed)

    def _write_files(self) -> _Written:
        files: list[tuple[TensorFile, dict[str, int], Path, Future[str]]] = []
        problem = None
        with ThreadPoolExecutor(1) as pool:  # one file is hashed while the next is written
            while (file := self._files.get()) is not None:
                if isinstance(file, str):
                    return _Written(file)
                sizes = {name: t.numel() * t.element_size() for name, t in file.tensors.items()}
                path = self.temporary / f"{file.part.stem}.{self.rank}.{file.number}.part"
                try:
                    if problem is None:
                        save_file(file.tensors, path, metadata={"format": "pt", **file.part.metadata})
                        files.append((file, sizes, path, pool.submit(seal, path)))
                except Exception as error:
                    problem = _said(error)
                file.tensors = {}
        written = _Written(problem)
        for file, sizes, path, checksum in () if problem else files:
            written.add(self._name_of(file), file.part, sizes, path, checksum)
        return written

    def _name_of(self, file: TensorFile) -> str:
        """Known only now that all tensors have been shared out."""
        counts = self.counts[file.part.stem]
        return file_name(file.part.stem, sum(counts[: self.rank]) + file.number, sum(counts))

    def _complete(self, answers: list[_Written]) -> str | None:
        """Write indexes and checksums, rename. Returns what went wrong."""
        sums: dict[str, str] = {}
        try:
            for written in answers:
                sums |= written.sums
            for stem in dict.fromkeys(stem for written in answers for stem in written.index):
                if sum(self.counts[stem]) > 1:
                    self._write_index(stem, answers)
            publish(self.temporary, self.target, sums)
            self.done()
        except Exception as error:
            return _said(error)
        return None

    def _write_index(self, stem: str, answers: list[_Written]) -> None:
        where: dict[str, str] = {}
        for written in answers:
            where |= written.index.get(stem, {})
        total = sum(written.nbytes.get(stem, 0) for written in answers)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (self.temporary / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _told(self, failed: dict[int, str]) -> CheckpointError | ElsewhereError:
        """The first rank that failed says so to people, the others stop with it."""
        first = min(failed)
        which = f"on rank {first}: " if self.size > 1 else ""
        kind = CheckpointError if self.rank == first else ElsewhereError
        return kind(f"{self.target} could not be written: {which}{failed[first]}; {self.advice()}")


@dataclass
class _Written:
    """What one rank's thread has done, for the others.

    Attributes:
        problem: What went wrong; then the rest says nothing.
        sums: Checksums of files by name.
        index: By part that has an index: the file of each tensor.
        nbytes: By part that has an index: size of the tensors.
    """

    problem: str | None = None
    sums: dict[str, str] = field(default_factory=dict)
    index: dict[str, dict[str, str]] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, part: Part, sizes: dict[str, int], path: Path, checksum: Future[str]) -> None:
        """A file that is written under another name so far."""
        try:
            self.sums[name] = checksum.result()
            if part.index:
                self.index.setdefault(part.stem, {}).update(dict.fromkeys(sizes, name))
                self.nbytes[part.stem] = self.nbytes.get(part.stem, 0) + sum(sizes.values())
            os.replace(path, path.with_name(name))
        except OSError as error:
            self.problem = self.problem or str(error)


def _said(error: Exception) -> str:
    """What is told on all ranks, which would wait for one that does not say anything."""
    known = isinstance(error, OSError | SafetensorError)  # the latter on a full disk
    return str(error) if known else f"{type(error).__name__}: {error}"
