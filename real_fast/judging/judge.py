"""A judge to call from Python: ``from real_fast import Judge``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from real_fast.config import Config, EvalConfig, PromptConfig, RolloutConfig, ScaleConfig, TrainConfig
from real_fast.config.validation import check_value
from real_fast.data.rows import parse_texts
from real_fast.errors import ConfigError, GradeError, JudgeError, PromptError, RowError
from real_fast.judging.arguments import check_arguments, check_model, known_arguments
from real_fast.judging.grade import SAMPLING_FAILED, Grade, raise_if_ungraded, request, verdict
from real_fast.judging.prometheus_names import PrometheusNames
from real_fast.judging.sharing import Alone, judge_made
from real_fast.judging.waiting import CLOSED, Waiting
from real_fast.model.judge_settings import judge_config
from real_fast.model.load import load_tokenizer
from real_fast.prompt.builder import PromptBuilder
from real_fast.rollout.checked import check
from real_fast.rollout.engine import RolloutEngine
from real_fast.rollout.make import load_engine
from real_fast.rollout.transformers_engine import TransformersEngine
from real_fast.score.protocol import ProtocolName, sampling
from real_fast.score.scale import ScoreScale
from real_fast.types import Rollout, SamplingParams
from real_fast.utils.seeds import call_seed


class Judge(PrometheusNames):
    """Grades responses with a language model.

    Of a folder that real-fast train wrote, scale, prompt, answer, lengths and the protocol of its evaluations are taken
    over where they are not given.

    Safe to call from several threads, also where judges share a loaded model or a tokenizer: calls wait for each other.
    Not after a fork: a child process makes its own, on one thread ("spawn" gives it all). To use an engine's batching,
    hand many rows to :meth:`grade_batch`, or call :meth:`agrade`, whose waiting calls are graded together. Every call
    is reproducible: its samples are a function of the weights, the `seed` and the row's place among the rows of the
    call that can be graded (floating-point order apart).

    Args:
        model: A folder, a model on the Hugging Face hub, or a loaded Transformers causal language model.
        scale: The scores, or scores and phrase.
        engine: "auto" takes vLLM where it can be imported; a loaded model is sampled with Transformers.
        n: Feedbacks sampled per response; their score distributions are averaged.
        temperature: Sampling temperature of the feedback; 0 for greedy.
        protocol: How the score is read: see :mod:`real_fast.score.protocol`. None for the folder's, or "real".
        prompt: How a request becomes a prompt. A mapping, such as ``{"max_tokens": 4096}``, changes some settings and
            leaves the folder's others; a PromptConfig stands in place of all of them.
        rollout: max_tokens, top_p, answer and the engine's limits; a mapping or a RolloutConfig, as for `prompt`.
        renormalize: Softmax over the score tokens alone.
        precision: Number format of the weights: "bf16", "fp32", or "auto": what is fast here. A loaded model keeps its
            own.
        device: "auto" takes CUDA where there is one.
        tokenizer: The model's, where it is loaded already.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ConfigError: An argument that it does not have, or is none of the allowed values; settings that cannot work.
        ModelError: No such model, or one that cannot be loaded.
        PromptError: A template that cannot build a prompt.
        ScaleError: A scale that the tokenizer does not write in one token per score.
    """

    @known_arguments
    def __init__(
        self,
        model: Any,
        *,
        scale: Sequence[float] | ScaleConfig | None = None,
        engine: Literal["auto", "transformers", "vllm", "vllm-server"] = "auto",
        n: int = 1,
        temperature: float = 1.0,
        protocol: ProtocolName | None = None,
        prompt: PromptConfig | Mapping[str, Any] | None = None,
        rollout: RolloutConfig | Mapping[str, Any] | None = None,
        renormalize: bool | None = None,
        precision: Literal["auto", "bf16", "fp32"] = "auto",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        tokenizer: Any = None,
        trust_remote_code: bool = False,
    ) -> None:
        check_arguments(
            scale=scale,
            prompt=prompt,
            rollout=rollout,
            engine=engine,
            n=n,
            temperature=temperature,
            protocol=protocol,
            renormalize=renormalize,
            precision=precision,
            device=device,
            trust_remote_code=trust_remote_code,
        )
        judge_made()
        loaded = not isinstance(model, str | os.PathLike)
        check_model(model)
        if tokenizer is not None and not callable(tokenizer):
            raise ConfigError(f"tokenizer is {tokenizer!r}: give a loaded one, AutoTokenizer.from_pretrained(...)")
        name = str(model.config.name_or_path if loaded else model)
        if loaded and tokenizer is None and not name:
            raise ConfigError("the model is loaded and does not say where from: give its tokenizer too")
        self.config = config = judge_config(
            name if not loaded or Path(name).expanduser().is_dir() else "",
            scale,
            prompt,
            rollout,
            renormalize,
            protocol,
            EvalConfig(n=n, temperature=temperature),
        )
        config.trust_remote_code = trust_remote_code
        config.train = TrainConfig(precision=precision, device=device)
        if engine != "auto":
            config.rollout = replace(config.rollout, engine=engine)
        config.validate()
        if config.rollout.engine.startswith("vllm") and loaded:
            raise ConfigError(
                f"engine is {config.rollout.engine}, which loads a model itself: give the model's folder or hub name"
            )
        tokenizer = tokenizer if tokenizer is not None else load_tokenizer(name, trust_remote_code)
        with Alone(tokenizer).held():  # another judge, or thread, may be encoding with it
            self.scale = ScoreScale.from_config(tokenizer, config.scale, config.prompt)
            self._builder = PromptBuilder(config.prompt, tokenizer, self.scale)
        self._engine: RolloutEngine | None
        if loaded:
            self._engine = TransformersEngine(model, tokenizer, self.scale, max_num_seqs=config.rollout.max_num_seqs)
        else:
            self._engine = load_engine(config, tokenizer, self.scale)
        self._alone = Alone(self._engine, tokenizer, *([model] if loaded else []))
        self._process = os.getpid()
        self._waiting = Waiting(self._grade_each, self._at_once(n))

    @known_arguments
    def grade(
        self,
        instruction: str,
        response: str,
        rubric: str | Mapping[str, str] = "",
        reference_answer: str | None = None,
        *,
        seed: int = 0,
    ) -> Grade:
        """Grade one response.

        Args:
            instruction: What the response answers.
            response: The text to grade.
            rubric: Text, or Prometheus's dictionary (``criteria``, ``score1_description``, ...).
            reference_answer: None or "" for none.
            seed: Another seed samples another feedback.

        Raises:
            GradeError: The request cannot be graded. (A feedback without a score is a :class:`Grade` with an `error`.)
            JudgeError: The judge is closed, or was made before a fork; its engine failed.
        """
        return raise_if_ungraded(self.grade_batch([request(instruction, response, rubric, reference_answer)], seed)[0])

    @known_arguments
    def grade_batch(self, rows: Sequence[Any], seed: int = 0) -> list[Grade]:
        """Grade many responses, one :class:`Grade` per row, in order.

        Args:
            rows: Mappings with the fields of judge data, Prometheus's or the common ones (see docs/data.md); others, a
                label too, are passed over. One that cannot be graded gets a Grade with an `error`; the others go on.
                A data frame of pandas or Polars, or an Arrow table, counts as the list of its rows.
            seed: See :class:`Judge`.

        Raises:
            GradeError: `rows` is no list of rows, but one row, say.
            JudgeError: The judge is closed, or was made before a fork.
        """
        return self._grade(rows, self._sampling(seed))

    @known_arguments
    async def agrade(
        self,
        instruction: str,
        response: str,
        rubric: str | Mapping[str, str] = "",
        reference_answer: str | None = None,
        *,
        seed: int = 0,
    ) -> Grade:
        """:meth:`grade` in a thread, so that an event loop goes on with other work.

        Calls that wait while the judge is busy are graded as one batch; each gets the grade that :meth:`grade` gives,
        whoever waits beside it (floating-point order apart), and its own error. A call that is cancelled while it waits
        costs nothing.
        """
        self._check_process()
        row = request(instruction, response, rubric, reference_answer)
        return raise_if_ungraded(await asyncio.wrap_future(self._waiting.row(row, seed)))

    @known_arguments
    async def agrade_batch(self, rows: Sequence[Any], seed: int = 0) -> list[Grade]:
        """:meth:`grade_batch` in a thread."""
        self._check_process()
        return await asyncio.wrap_future(self._waiting.call(partial(self.grade_batch, rows, seed)))

    def close(self) -> None:
        """Free the model. The judge cannot grade afterwards."""
        if os.getpid() != self._process:
            return  # it is the parent's, whose threads are not here to be waited for
        self._waiting.close()
        with self._alone.held():
            engine, self._engine = self._engine, None
            if engine is not None:
                engine.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_process(self) -> None:
        """After a fork the engine's threads are gone, and a lock may be held by one of them for ever."""
        if os.getpid() != self._process:
            raise JudgeError(
                f"this judge was made in process {self._process}, and this one, {os.getpid()}, was forked from it: "
                'make the judge in the process that uses it, or start processes with multiprocessing\'s "spawn"'
            )

    def _sampling(self, seed: int) -> SamplingParams:
        check_value("seed", seed, Config, "seed")
        return sampling(self.config.eval, self.config.rollout, int(seed))

    def _at_once(self, n: int) -> int:
        """Rows that the engine samples at a time."""
        return max(1, self.config.rollout.max_num_seqs // n)

    def _grade_each(self, rows: Sequence[Any], seed: int) -> list[Grade]:
        """Grades of requests that know nothing of each other."""
        return self._grade(rows, replace(self._sampling(seed), alone=True))

    def _grade(self, rows: Iterable[Any], params: SamplingParams) -> list[Grade]:
        """Grades in order; the locks also cover the tokenizer, which threads must not share either."""
        self._check_process()
        rows = _listed(rows)
        with self._alone.held():
            if self._engine is None:
                raise JudgeError(CLOSED)
            grades: list[Grade] = []
            prompts: list[list[int]] = []
            places: list[int] = []
            for place, row in enumerate(rows):
                try:
                    prompts.append(self._prompt(row))
                    places.append(place)
                    grades.append(Grade())
                except (RowError, PromptError) as error:
                    grades.append(Grade(error=str(error)))
                except Exception as error:  # a row is anybody's object: whatever it raises is about this row alone
                    grades.append(Grade(error=f"the row cannot be read: {type(error).__name__}: {error}"))
            step = self._at_once(params.n)
            for at in range(0, len(prompts), step):
                some = replace(params, seed=call_seed(params.seed, 0 if params.alone else at))
                found = self._sample(self._engine, prompts[at : at + step], some)
                for place, rollouts in zip(places[at : at + step], found, strict=True):
                    grades[place] = self._verdict(rollouts)
            return grades

    def _prompt(self, row: Any) -> list[int]:
        builder, limit = self._builder, self.config.prompt.max_tokens
        prompt = builder.marked(parse_texts(row, builder.uses("rubric"), self.scale.phrase, builder.uses("extra")))
        builder.check_length(prompt, limit)
        [ids] = builder.encode([prompt])
        if len(ids) > limit:
            raise RowError(f"prompt is too long: {len(ids)} tokens, prompt.max_tokens is {limit}")
        return ids

    def _sample(
        self, engine: RolloutEngine, prompts: list[list[int]], params: SamplingParams
    ) -> list[list[Rollout] | str]:
        """Rollouts of every prompt, or what went wrong with it; a batch that fails is halved until that is known."""
        try:
            found = list(engine.generate(prompts, params))
            check(found, engine, len(prompts), params, self.scale, scored=False)
            return [*found]
        except Exception as error:  # engines raise a dozen unrelated kinds, memory among them
            if len(prompts) == 1:
                # In words: the exception's traceback would keep the failed call's tensors while the others are sampled.
                return [f"{SAMPLING_FAILED}: {type(error).__name__}: {error}"]
        half = len(prompts) // 2
        later = params if params.alone else replace(params, seed=call_seed(params.seed, half))
        return self._sample(engine, prompts[:half], params) + self._sample(engine, prompts[half:], later)

    def _verdict(self, rollouts: list[Rollout] | str) -> Grade:
        if isinstance(rollouts, str):
            return Grade(error=rollouts)
        return verdict(rollouts, self.scale, self.config.eval.protocol, self.config.objective.renormalize)


def _listed(rows: Any) -> list[Any]:
    """The rows as a list. Raises :class:`GradeError` for what is one row, or none."""
    if hasattr(rows, "columns"):  # a table of Polars, Arrow or pandas, whose own iterator gives names or columns
        for name, arguments in (("to_dicts", ()), ("to_pylist", ()), ("to_dict", ("records",))):
            if hasattr(rows, name):
                rows = getattr(rows, name)(*arguments)
                break
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise GradeError(f"rows is a {type(rows).__name__}: give a list of rows, [row] for a single one")
    return list(rows)
