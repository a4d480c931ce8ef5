"""TRACT's two stages (arXiv 2503.04381): train on given feedback, let that model write its own, start over on that.

The feedback that the first model writes becomes a dataset, OUTPUT/self_generated.jsonl, which any method can train on.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from real_fast.config import Config, DataConfig
from real_fast.data.sources import benchmarks
from real_fast.distributed.world import ALONE, World
from real_fast.errors import DataError, OutputError
from real_fast.methods.base import Stages, Trained
from real_fast.methods.supervised import LossWeights, Supervised
from real_fast.model.folder import check_as_written
from real_fast.model.judge_settings import trained_settings
from real_fast.rollout.checked import sample
from real_fast.runs import logged
from real_fast.runs.folder import move_aside
from real_fast.runs.lock import alone_in
from real_fast.runs.progress import progress_bar
from real_fast.runs.trackers import check_installed
from real_fast.types import JudgeRow, Rollout, SamplingParams
from real_fast.utils.files import replacing
from real_fast.utils.jsonio import write_json, write_jsonl
from real_fast.utils.seeds import step_seed

logger = logging.getLogger(__name__)
_ROWS_PER_CALL = 32
_HANDOVER = "handover.json"  # checksums of what stage 2 reads of stage 1


class Tract(Supervised):
    """Cross-entropy of the feedback and squared error of the expected score, in two stages."""

    name = "tract"

    @property
    def weights(self) -> LossWeights:
        """The squared error's weight is a setting."""
        return LossWeights(feedback=1.0, squared_error=self.config.supervised.squared_error)

    @classmethod
    def stages(cls, config: Config, world: World = ALONE) -> Stages:
        """Both stages; with ``resume``, what is complete is kept.

        OUTPUT/stage1 holds the first run; OUTPUT itself is the second, so that OUTPUT/final is the judge.

        Raises:
            OutputError: The output holds a run, and neither ``resume`` nor ``overwrite`` is set.
            DataError: The first model finished too little feedback.
        """
        if config.supervised.stages == 1:
            yield config
            return
        folder = Path(config.output).expanduser()
        check_installed(config)  # before an earlier run is moved aside
        generated = folder / "self_generated.jsonl"
        with world.together():
            if world.is_main:
                if config.overwrite and any((folder / name).exists() for name in ("config.yaml", "stage1")):
                    move_aside(folder)
                if generated.is_file() and not config.resume:
                    raise OutputError(
                        f"output {folder} holds a run: take another --output, --resume it, or --overwrite it"
                    )
                if generated.is_file() and not config.allow_changed:
                    _check_handover(folder, generated)
        name = config.run_name or folder.resolve().name
        single = replace(config, overwrite=False, supervised=replace(config.supervised, stages=1))
        if not world.main(generated.is_file()):
            first = replace(single, output=str(folder / "stage1"), run_name=f"{name}-stage1")
            with alone_in(first.output, world):  # a folder of its own, that another command may be given
                with world.together():
                    if world.is_main:
                        _sample_next(first)
                stage = yield first
                assert stage is not None
                logger.info("TRACT, stage 1 is done: its model now writes the feedback for stage 2")
                started = time.perf_counter()
                rollouts = sample_feedback(stage, config)
                with world.together():
                    if world.is_main:
                        _add_seconds(stage.folder / "summary.json", "self_generated", time.perf_counter() - started)
                        for benchmark, path in _held_out(config, folder).items():
                            some = [row for row in stage.data.eval if row.benchmark == benchmark]
                            write_jsonl(path, (record(row, row.feedbacks) for row in some))
                        needed = config.supervised.prompts_per_step
                        _write(generated, stage.data.train, rollouts, stage.scale.phrase, needed, keep_cut=config.debug)
                        text = logged.text_of(folder, [generated.name, "held_out*.jsonl"])
                        with replacing(folder / _HANDOVER) as temporary:
                            temporary.write_text(text, encoding="utf-8")
                stage.engine.close()
                del stage
        held_out = {name: str(path) for name, path in _held_out(config, folder).items()}
        # Rows whose feedback was cut off have been counted, and stage 1 is paid for: no share of them is too large.
        data = DataConfig(train=str(generated), eval=held_out.get("", held_out), max_rejected=1)
        # The template as the first stage was trained with it: the file may have been edited since.
        first_judge = folder / "stage1" / "final"
        known: dict[str, Any] = {}
        if first_judge.is_dir():
            check_as_written(first_judge, weights=False)
            known = trained_settings(str(first_judge)).get("prompt", {})
        prompt = replace(config.prompt, template=known.get("template", config.prompt.template))
        yield replace(single, data=data, prompt=prompt, run_name=f"{name}-stage2")


def _check_handover(folder: Path, generated: Path) -> None:
    """Refuse rows that changed since stage 1 wrote them. Raises :class:`DataError`."""
    try:
        names = logged.changed(folder, folder / _HANDOVER)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder / _HANDOVER} is damaged ({error}): remove it, and the rows of stage 2 are taken as they are"
        ) from error
    if names:
        raise DataError(
            f"{', '.join(str(folder / name) for name in names)}: not as stage 1 wrote it. Where it is damaged, remove "
            f"{generated} and --resume: stage 1's model writes all of it anew. Where you changed it, --allow-changed"
        )


def _held_out(config: Config, folder: Path) -> dict[str, Path]:
    """Where stage 2 finds the held-out rows of each benchmark; of a single one, which has no name, under ""."""
    names = benchmarks(config.data.eval) if config.data.eval else [""]
    return {name: folder / (f"held_out.{name}.jsonl" if name else "held_out.jsonl") for name in names}


def sample_feedback(stage: Trained, config: Config) -> list[list[Rollout]]:
    """What the trained model of a stage writes about its training rows."""
    rows, rollouts = stage.data.train, []
    with progress_bar("self-generated feedback", len(rows), "row") as bar:
        for at in range(0, len(rows), _ROWS_PER_CALL):
            some = rows[at : at + _ROWS_PER_CALL]
            params = SamplingParams(
                n=config.supervised.feedbacks_per_prompt,
                max_tokens=config.rollout.max_tokens,
                temperature=config.rollout.temperature,
                top_p=config.rollout.top_p,
                answer="forced",
                seed=step_seed(config.seed, at),
                scores=False,
            )
            rollouts += sample(stage.engine, [r.prompt_ids for r in some], params, stage.scale, [r.id for r in some])
            bar.update(len(some))
    return rollouts


def _add_seconds(summary: Path, phase: str, seconds: float) -> None:
    """What is done after a run's end counts as a phase of it."""
    known = json.loads(summary.read_text(encoding="utf-8"))
    known["seconds"][phase] = round(seconds, 2)
    write_json(summary, known)


def _sample_next(config: Config) -> None:
    """Let a first stage that is finished go on from its end: only the feedback that it writes is missing."""
    finished = Path(config.output) / "summary.json"
    if config.resume and finished.is_file():
        os.replace(finished, finished.with_name("summary.superseded.json"))


def _write(
    path: Path,
    rows: Sequence[JudgeRow],
    rollouts: Iterable[Sequence[Rollout]],
    phrase: str,
    needed: int,
    keep_cut: bool,
) -> None:
    """Rows with the feedback that was finished; what was cut off at the limit stands beside it and is not trained on.

    `keep_cut`, of a debugging run, trains on that too.

    Raises:
        DataError: Too few rows have a finished feedback; what there is stands in ``self_generated.rejected.jsonl``.
    """
    records, kept, cut = [], 0, 0
    for row, samples in zip(rows, rollouts, strict=True):
        done = [feedback_of(r, phrase) for r in samples if keep_cut or r.finish != "length"]
        unfinished = [r.text for r in samples if r.finish == "length" and not keep_cut]
        done = [text for text in done if text]
        kept, cut = kept + len(done), cut + len(samples) - len(done)
        records.append({**record(row, done), "unfinished_feedbacks": unfinished})
    usable = sum(bool(r["feedbacks"]) for r in records)
    if usable < needed:
        rejected = path.with_name("self_generated.rejected.jsonl")
        write_jsonl(rejected, records)
        raise DataError(
            f"of {kept + cut} feedbacks that the model of stage 1 wrote, {cut} are empty or were cut off at "
            f"rollout.max_tokens (see {rejected}); {usable} rows are left and an update needs {needed}: train stage 1 "
            "longer or raise rollout.max_tokens, and --resume"
        )
    logger.info("%d feedbacks written to %s; %d were cut off at rollout.max_tokens or empty", kept, path, cut)
    write_jsonl(path, records)


def feedback_of(rollout: Rollout, phrase: str) -> str:
    """The text before the phrase that the score stands behind, which is the last one."""
    return rollout.text.rpartition(phrase.strip())[0].strip()


def record(row: JudgeRow, feedbacks: Sequence[str]) -> dict[str, Any]:
    """A row as a line of a data file."""
    return {
        "id": row.id,
        "prompt_id": row.prompt_id,
        "instruction": row.instruction,
        "response": row.response,
        "rubric": row.rubric,
        "reference_answer": row.reference_answer,
        **({"messages": row.messages} if row.messages else {}),
        # Apart from the others: a field such as orig_feedback would be read in place of the new feedback.
        **({"extra": row.extra} if row.extra else {}),
        "score": row.label,
        "feedbacks": list(feedbacks),
    }
