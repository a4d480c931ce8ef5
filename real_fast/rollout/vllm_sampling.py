"""Sampling by vLLM until a verdict is written, whichever way requests get to it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from real_fast.model.folder import weight_names
from real_fast.rollout.assemble import build_rollout, check_prompts, eos_ids
from real_fast.rollout.completions import completions
from real_fast.score.phrase import PhraseFinder, parse_sample
from real_fast.score.scale import ScoreScale
from real_fast.types import Rollout, SamplingParams
from real_fast.utils.seeds import random_stream


@dataclass
class _Sample:
    """One sample on its way: its ids, their log-probabilities, and where vLLM's stand of each of its steps."""

    place: int
    index: int
    thought: str
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    steps: list[tuple[Any, int, int]] = field(default_factory=list)

    def add(self, completion: Any) -> _Sample:
        """What a request sampled goes behind what there is."""
        flat = completion.logprobs
        for token, start, end in zip(completion.token_ids, flat.start_indices, flat.end_indices, strict=True):
            self.ids.append(int(token))
            self.logprobs.append(flat.logprobs[flat.token_ids.index(token, start, end)])
            self.steps.append((flat, start, end))
        return self


class VllmSampling(ABC):
    """What an engine in this process and one behind a server do alike.

    Args:
        model_path: A Hugging Face model folder (safetensors, tokenizer included).
        tokenizer: Its tokenizer.
        scale: The score scale.
        dtype: Of weights and computation.
        max_model_len: Longest sequence: prompt, sampled tokens, phrase and score.
        top_p: The smallest that will be sampled with; it decides which log-probabilities vLLM reports.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ModelError: The folder has no safetensors that can be read.
    """

    _tied = False

    def __init__(
        self,
        model_path: Path,
        tokenizer: Any,
        scale: ScoreScale,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        top_p: float,
        trust_remote_code: bool,
    ) -> None:
        # Rotary frequencies, which old checkpoints hold, are computed.
        self._names = {name for name in weight_names(model_path) if not name.endswith("rotary_emb.inv_freq")}
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        has_generation = (model_path / "generation_config.json").is_file()
        generation = GenerationConfig.from_pretrained(model_path) if has_generation else None
        self.tokenizer = tokenizer
        self.scale = scale
        self.dtype = self.takes = dtype
        self.max_model_len = max_model_len
        self.finder = PhraseFinder(tokenizer, scale)
        self.eos_ids = eos_ids(tokenizer, scale, generation or config.get_text_config())
        self.vocabulary = int(config.get_text_config().vocab_size)
        # Raw ones are the model's, before temperature and top_p; processed ones come after both.
        self._processed = top_p >= 1

    @abstractmethod
    def _params(self, score_tokens: bool, **kwargs: Any) -> Any:
        """Parameters of a request, `kwargs` under vLLM's names; `score_tokens` asks for their log-probabilities."""

    @abstractmethod
    def _run(self, prompts: Sequence[Sequence[int]], params: list[Any]) -> list[Any]:
        """Sample; results in the order of the prompts, with ``outputs`` as vLLM has them, log-probabilities flat."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Rollout]]:
        """Sample ``sampling.n`` rollouts for every prompt.

        Samples are a function of ``sampling.seed`` and the prompt's place, as far as vLLM's batching leaves the numbers
        alike.
        Score log-probabilities come from the pass that sampled the score, where the model got there on its own and
        vLLM reports them at temperature 1; otherwise from a second, one-token pass. Where ``sampling.scores`` says that
        nobody reads them, they are not asked for.

        Raises:
            EngineError: vLLM gave what cannot be samples of the prompts.
            ValueError: An empty or too long prompt, or a temperature and top_p of which vLLM cannot report the sampled
                tokens' log-probabilities (top_p below 1 with a temperature other than 0 and 1); before any work.
        """
        check_prompts(prompts, sampling, self.scale, self.max_model_len, self.vocabulary)
        self._check_sampling(sampling)
        # Processed log-probabilities at another temperature are right for the sampled token and wrong for the score;
        # an answer that is cut has its score elsewhere.
        same_pass = sampling.scores and sampling.answer in ("forced", "generated")
        same_pass = same_pass and (not self._processed or sampling.temperature in (0, 1))
        samples = self._sample(prompts, sampling, same_pass)
        parsed = [parse_sample(s.ids, self.eos_ids, self.finder, sampling.answer, s.thought) for s in samples]
        scores: list[list[float] | None] = []
        later: list[int] = []
        for i, (sample, p) in enumerate(zip(samples, parsed, strict=True)):
            at = p.score_position
            if sampling.scores and p.has_score and (at is None or not same_pass):
                later.append(i)
            scores.append(self._score(*sample.steps[at]) if at is not None and same_pass else None)
        contexts = [[*prompts[samples[i].place], *parsed[i].context_ids] for i in later]
        params = [self._params(True, temperature=0.0, max_tokens=1) for _ in later]
        places = [sampling.place(samples[i].place) for i in later]
        for i, [answer] in zip(later, self._answers(contexts, params, 1, [1] * len(later), places), strict=True):
            flat = answer.logprobs
            scores[i] = self._score(flat, flat.start_indices[0], flat.end_indices[0])
        results: list[list[Rollout]] = [[] for _ in prompts]
        for s, p, score in zip(samples, parsed, scores, strict=True):
            results[s.place].append(build_rollout(self.finder, s.ids, s.logprobs, p, score, sampling.texts))
        greedy = sampling.temperature == 0  # vLLM refuses to give the same text more than once
        return [[copy.deepcopy(group[0]) for _ in range(sampling.n)] for group in results] if greedy else results

    def _sample(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, score_tokens: bool) -> list[_Sample]:
        """Sample until a verdict is written; in the order of the prompts.

        `score_tokens` asks for their log-probabilities too, at every position.

        vLLM stops at the first phrase with a score behind it. Where that is in a thought or a quotation, or may be the
        beginning of a longer number, sampling goes on from there, as a request of its own.
        """
        verdict = [self.scale.phrase.lstrip() + text for text in self.scale.texts]
        samples: list[_Sample] = []
        n = sampling.n if sampling.temperature > 0 else 1
        params, thoughts = [], [self.finder.thought(prompt) for prompt in prompts]
        for place, thought in enumerate(thoughts):
            seed = random_stream(sampling.seed, sampling.place(place)).getrandbits(62)  # sample i gets seed + i
            stop = [thought] if thought else verdict
            params.append(self._sampling_params(sampling, score_tokens, sampling.max_tokens, seed, stop, n))
        places = [sampling.place(place) for place in range(len(prompts))]
        answers = self._answers(prompts, params, n, [sampling.max_tokens] * len(prompts), places)
        for place, answer in enumerate(answers):
            for completion in answer:
                samples.append(_Sample(place, completion.index, thoughts[place]).add(completion))
        while going := [s for s in samples if self._goes_on(s, sampling)]:
            params, most = [], []
            for s in going:
                seed = random_stream(sampling.seed, sampling.place(s.place), s.index, len(s.ids)).getrandbits(62)
                wait = self.finder.waits_for(s.ids, s.thought)
                left = 1 if wait == "number" else sampling.max_tokens - len(s.ids)
                stop = {"number": [], "": verdict}.get(wait, [wait])
                params.append(self._sampling_params(sampling, score_tokens, left, seed, stop))
                most.append(left)
            places, contexts = [sampling.place(s.place) for s in going], [[*prompts[s.place], *s.ids] for s in going]
            for s, [answer] in zip(going, self._answers(contexts, params, 1, most, places), strict=True):
                s.add(answer)
        return samples

    def _answers(
        self, prompts: Sequence[Sequence[int]], params: list[Any], n: int, most: list[int], places: list[int]
    ) -> list[list[Any]]:
        """Run requests for `n` samples of at most `most` tokens, and look at what comes back."""
        return completions(self._run(prompts, params), prompts, n, most, places, self.vocabulary)

    def _goes_on(self, s: _Sample, sampling: SamplingParams) -> bool:
        """Whether vLLM stopped at a string that is no settled verdict."""
        if s.ids[-1] in self.eos_ids or len(s.ids) >= sampling.max_tokens:
            return False
        return not self.finder.settled(s.ids, sampling.answer, s.thought)

    def _sampling_params(
        self, sampling: SamplingParams, score_tokens: bool, most: int, seed: int, stop: list[str], n: int = 1
    ) -> Any:
        return self._params(
            score_tokens,
            n=n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=most,
            seed=seed,
            stop=stop,
            stop_token_ids=sorted(self.eos_ids),
            include_stop_str_in_output=True,
            skip_special_tokens=False,  # as PhraseFinder reads
        )

    def _score(self, flat: Any, start: int, end: int) -> list[float]:
        """The score tokens' log-probabilities among those of one position."""
        return [float(flat.logprobs[flat.token_ids.index(token, start, end)]) for token in self.scale.score_ids]

    def _check_sampling(self, sampling: SamplingParams) -> None:
        if 0 < sampling.temperature < 0.01:
            raise ValueError(f"vLLM samples at temperature 0 or from 0.01 up, and it is {sampling.temperature}")
        if self._processed and sampling.temperature > 0 and sampling.top_p < 1:
            raise ValueError(
                f"this engine was set up for top_p 1 and cannot report log-probabilities at top_p {sampling.top_p}: "
                "set rollout.top_p (VllmEngine's top_p) to the smallest that will be used"
            )
        if not self._processed and sampling.temperature not in (0, 1):
            raise ValueError(
                "with top_p below 1, vLLM reports log-probabilities at temperature 1 alone, and the temperature is "
                f"{sampling.temperature}: set rollout.top_p or the temperature to 1, or rollout.engine to transformers"
            )

    def _to_send(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], given: set[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The trainer's weights, a tied head left out; `given` gets their names.

        Raises:
            ValueError: A name that is not in the model folder's safetensors.
        """
        for name, tensor in named_tensors:
            if name in self._left_out:
                continue
            if name not in self._names:
                raise ValueError(f"sync got the weight {name!r}, which the model folder's safetensors do not have")
            given.add(name)
            yield name, tensor.detach()

    def _check_given(self, given: set[str]) -> None:
        """Raise :class:`ValueError` where a weight of the model's was left out."""
        missing = sorted(self._names - self._left_out - given)
        if missing:
            raise ValueError(f"sync did not get {len(missing)} of the model's weights: {', '.join(missing[:5])}")

    @property
    def _left_out(self) -> set[str]:
        return {"lm_head.weight"} if self._tied or "lm_head.weight" not in self._names else set()
