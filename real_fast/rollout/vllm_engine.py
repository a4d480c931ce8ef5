"""Rollouts by vLLM, in this process. Everything that depends on vLLM's interface is in this file."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from real_fast.errors import ConfigError
from real_fast.model.folder import model_alone, weight_names
from real_fast.rollout.assemble import build_rollout, check_prompts, eos_ids
from real_fast.rollout.process_state import process_state_kept
from real_fast.score.phrase import PhraseFinder, parse_sample
from real_fast.score.scale import ScoreScale
from real_fast.types import Rollout, SamplingParams
from real_fast.utils.seeds import random_stream


def import_vllm() -> Any:
    """Import vLLM, set up to run inside this process and to leave the trainer's cores alone."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over as tensors, not through files
    # Its warnings are a page per start about settings chosen here on purpose; sync checks the weights itself.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with process_state_kept():
        import vllm

    return vllm


@dataclass
class _Sample:
    """One sample on its way: its ids, and vLLM's log-probabilities where each was sampled."""

    place: int
    index: int
    thought: str
    ids: list[int] = field(default_factory=list)
    steps: list[Any] = field(default_factory=list)

    def add(self, completion: Any) -> _Sample:
        """What a request sampled goes behind what there is."""
        self.ids += [int(token) for token in completion.token_ids]
        self.steps += completion.logprobs
        return self


class VllmEngine:
    """Samples with vLLM: prefix caching, continuous batching, score log-probabilities out of the same pass.

    Args:
        model_path: A Hugging Face model folder (safetensors, tokenizer included); its weights are the first ones.
        tokenizer: Its tokenizer.
        scale: The score scale.
        dtype: Of weights and computation.
        max_model_len: Longest sequence: prompt, sampled tokens, phrase and score.
        seed: vLLM's own; samples depend on :class:`SamplingParams`'s alone.
        max_num_seqs: Sequences decoded at a time.
        gpu_memory_utilization: Share of a GPU's memory for weights and cache. On CPU the cache has
            ``VLLM_CPU_KVCACHE_SPACE`` GiB (2 by default).
        top_p: The smallest that will be sampled with; it decides which log-probabilities vLLM reports.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ModelError: The folder has no safetensors that can be read.
    """

    name = "vllm"

    def __init__(
        self,
        model_path: Path,
        tokenizer: Any,
        scale: ScoreScale,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        seed: int = 0,
        max_num_seqs: int = 256,
        gpu_memory_utilization: float = 0.4,
        top_p: float = 1.0,
        trust_remote_code: bool = False,
    ) -> None:
        self._llm: Any = None
        self._has_run = False  # an attention that vLLM lacks (a head of 4 numbers on a CPU) shows in the first pass
        # Rotary frequencies, which old checkpoints hold, are computed.
        self._names = {name for name in weight_names(model_path) if not name.endswith("rotary_emb.inv_freq")}
        vllm = import_vllm()
        from transformers import AutoConfig, GenerationConfig
        from vllm.platforms import current_platform

        config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        has_generation = (model_path / "generation_config.json").is_file()
        generation = GenerationConfig.from_pretrained(model_path) if has_generation else None
        self.tokenizer = tokenizer
        self.scale = scale
        self.dtype = dtype
        self.max_model_len = max_model_len
        self.finder = PhraseFinder(tokenizer, scale)
        self.eos_ids = eos_ids(tokenizer, scale, generation or config.get_text_config())
        self._vocabulary = int(config.get_text_config().vocab_size)
        # Raw ones are the model's, before temperature and top_p; processed ones come after both.
        self._processed = top_p >= 1
        # On CPU: compiling takes minutes and buys little, and a prompt computed in two parts ends in "CPU Generator
        # does not use offset", because a seeded request is to take its random number back.
        on_cpu = current_platform.device_type == "cpu"
        whole_prompts = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, max_model_len)}
        with process_state_kept(), model_alone(model_path) as folder:
            self._llm = vllm.LLM(
                str(folder),
                dtype=str(dtype).removeprefix("torch."),
                distributed_executor_backend="uni",
                enable_prefix_caching=True,
                enforce_eager=on_cpu,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                gpu_memory_utilization=gpu_memory_utilization,
                logprobs_mode="processed_logprobs" if self._processed else "raw_logprobs",
                seed=seed,
                trust_remote_code=trust_remote_code,
                use_tqdm_on_load=False,
                hf_overrides={"head_dtype": "float32"},  # bf16 logits come in steps of 1/8, and scores with them
                **(whole_prompts if on_cpu else {}),
            )
        # Asked of vLLM: a checkpoint with a head of its own is not tied, whatever its config.json says.
        [self._tied] = self._llm.collective_rpc(_repack_tied_heads)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Rollout]]:
        """Sample ``sampling.n`` rollouts for every prompt.

        Samples are a function of ``sampling.seed`` and the prompt's place, as far as vLLM's batching leaves the numbers
        alike.
        Score log-probabilities come from the pass that sampled the score, where the model got there on its own and
        vLLM reports them at temperature 1; otherwise from a second, one-token pass.

        Raises:
            ConfigError: vLLM cannot compute this model here, which its first pass shows.
            ValueError: An empty or too long prompt, or a temperature and top_p of which vLLM cannot report the sampled
                tokens' log-probabilities (top_p below 1 with a temperature other than 0 and 1); before any work.
        """
        check_prompts(prompts, sampling, self.scale, self.max_model_len, self._vocabulary)
        self._check_sampling(sampling)
        samples = self._sample(prompts, sampling)
        # Processed log-probabilities at another temperature are right for the sampled token and wrong for the score.
        same_pass = not self._processed or sampling.temperature in (0, 1)
        parsed = [parse_sample(s.ids, self.eos_ids, self.finder, sampling.answer, s.thought) for s in samples]
        scores: list[list[float] | None] = []
        later: list[int] = []
        for i, (sample, p) in enumerate(zip(samples, parsed, strict=True)):
            at = p.score_position
            if p.has_score and (at is None or not same_pass):
                later.append(i)
            scores.append(self._score(sample.steps[at]) if at is not None and same_pass else None)
        contexts = [[*prompts[samples[i].place], *parsed[i].context_ids] for i in later]
        params = [self._params(temperature=0.0, max_tokens=1, detokenize=False) for _ in later]
        for i, output in zip(later, self._run(contexts, params), strict=True):
            scores[i] = self._score(output.outputs[0].logprobs[0])
        results: list[list[Rollout]] = [[] for _ in prompts]
        for s, p, score in zip(samples, parsed, scores, strict=True):
            logprobs = [float(step[token].logprob) for token, step in zip(s.ids, s.steps, strict=True)]
            results[s.place].append(build_rollout(self.tokenizer, s.ids, logprobs, p, score))
        greedy = sampling.temperature == 0  # vLLM refuses to give the same text more than once
        return [[copy.deepcopy(group[0]) for _ in range(sampling.n)] for group in results] if greedy else results

    def _sample(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[_Sample]:
        """Sample until a verdict is written; in the order of the prompts.

        vLLM stops at the first phrase with a score behind it. Where that is in a thought or a quotation, or may be the
        beginning of a longer number, sampling goes on from there, as a request of its own.
        """
        verdict = [self.scale.phrase.lstrip() + text for text in self.scale.texts]
        samples: list[_Sample] = []
        params, thoughts = [], [self.finder.thought(prompt) for prompt in prompts]
        for place, thought in enumerate(thoughts):
            n = sampling.n if sampling.temperature > 0 else 1
            seed = random_stream(sampling.seed, sampling.place(place)).getrandbits(62)  # sample i gets seed + i
            stop = [thought] if thought else verdict
            params.append(self._sampling_params(sampling, sampling.max_tokens, seed, stop, n))
        for place, output in enumerate(self._run(prompts, params)):
            for completion in sorted(output.outputs, key=lambda c: c.index):
                samples.append(_Sample(place, completion.index, thoughts[place]).add(completion))
        while going := [s for s in samples if self._goes_on(s, sampling)]:
            params = []
            for s in going:
                seed = random_stream(sampling.seed, sampling.place(s.place), s.index, len(s.ids)).getrandbits(62)
                wait = self.finder.waits_for(s.ids, s.thought)
                left = 1 if wait == "number" else sampling.max_tokens - len(s.ids)
                stop = {"number": [], "": verdict}.get(wait, [wait])
                params.append(self._sampling_params(sampling, left, seed, stop))
            outputs = self._run([[*prompts[s.place], *s.ids] for s in going], params)
            for s, output in zip(going, outputs, strict=True):
                s.add(output.outputs[0])
        return samples

    def sync(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Hand the trainer's weights to vLLM (a tied head may be left out) and drop what is cached under the old ones.

        Where it raises, the engine holds a part of the new weights, until another sync.

        Raises:
            ValueError: A name that is not in the model folder's safetensors, or a weight of it that was left out.
        """
        given: set[str] = set()
        left_out = {"lm_head.weight"} if self._tied or "lm_head.weight" not in self._names else set()

        def pairs() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in named_tensors:
                if name in left_out:
                    continue
                if name not in self._names:
                    raise ValueError(f"sync got the weight {name!r}, which the model folder's safetensors do not have")
                given.add(name)
                yield name, tensor.detach().to(self.dtype)

        with process_state_kept(), torch.no_grad():
            self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs()})
            self._engine.collective_rpc(_repack_tied_heads)
        missing = sorted(self._names - left_out - given)
        if missing:
            raise ValueError(f"sync did not get {len(missing)} of the model's weights: {', '.join(missing[:5])}")
        if self._engine.reset_prefix_cache() is False:
            raise RuntimeError(
                "vLLM did not drop its prefix cache after the sync: it still holds the old weights' results"
            )

    def close(self) -> None:
        """Free the weights and the cache."""
        if self._llm is None:
            return
        llm, self._llm = self._llm, None
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()

    @property
    def _engine(self) -> Any:
        if self._llm is None:
            raise RuntimeError("this rollout engine is closed")
        return self._llm

    def _goes_on(self, s: _Sample, sampling: SamplingParams) -> bool:
        """Whether vLLM stopped at a string that is no settled verdict."""
        if s.ids[-1] in self.eos_ids or len(s.ids) >= sampling.max_tokens:
            return False
        return not self.finder.settled(s.ids, sampling.answer, s.thought)

    def _sampling_params(self, sampling: SamplingParams, most: int, seed: int, stop: list[str], n: int = 1) -> Any:
        return self._params(
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

    def _params(self, **kwargs: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(logprob_token_ids=list(self.scale.score_ids), **kwargs)

    def _run(self, prompts: Sequence[Sequence[int]], params: list[Any]) -> list[Any]:
        """Results in the order of the prompts, which run sorted: those with a common beginning one after the other."""
        if not prompts:
            return []
        from vllm import TokensPrompt

        order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
        tokens = [TokensPrompt(prompt_token_ids=list(prompts[i])) for i in order]
        # vLLM draws from torch's generators here, and from no other; those are for other threads to use meanwhile.
        with process_state_kept(seeded=False):
            try:
                outputs = self._engine.generate(tokens, [params[i] for i in order], use_tqdm=False)
            except BaseException as error:  # Ctrl-C too: what is left unfinished would come out of the next call
                core = self._engine.llm_engine
                core.abort_request(list(core.output_processor.request_states), internal=True)
                if not self._has_run and isinstance(error, RuntimeError | NotImplementedError):
                    raise ConfigError(
                        f"vLLM started, and cannot compute this model here: {' '.join(str(error).split())[:300]}. Set "
                        "rollout.engine to transformers"
                    ) from error
                raise
        self._has_run = True
        return [output for _, output in sorted(zip(order, outputs, strict=True), key=lambda pair: pair[0])]

    def _score(self, step: Any) -> list[float]:
        return [float(step[token].logprob) for token in self.scale.score_ids]

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


def _repack_tied_heads(worker: Any) -> bool:
    """Make a tied head's packed copy anew on a CPU, since reloading does so for the embedding alone.

    Args:
        worker: vLLM's, in this process.

    Returns:
        Whether the model has a tied head.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.platforms import current_platform

    found, seen = False, set()
    for module in worker.get_model().modules():
        method = getattr(module, "quant_method", None)
        if not isinstance(method, UnquantizedEmbeddingMethod):
            continue
        if id(module.weight) in seen:
            found = True
            if current_platform.is_cpu():
                method.process_weights_after_loading(module)
        seen.add(id(module.weight))
    return found
