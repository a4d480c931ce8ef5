"""Rollouts by vLLM, in this process. All that depends on vLLM's interface is here and in vllm_inside.py."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from real_fast.errors import ConfigError
from real_fast.model.folder import model_alone, weight_names
from real_fast.model.lora import adapter_tensors, merged_tensors, save_adapters
from real_fast.rollout.adapter_folder import adapter_folder
from real_fast.rollout.assemble import build_rollout, check_prompts, eos_ids
from real_fast.rollout.process_state import process_state_kept
from real_fast.rollout.vllm_inside import (
    held_bytes,
    lora_settings,
    process_group_kept,
    repack_tied_heads,
    share_one_adapter,
    spell_no_logprobs,
)
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
        sleeps: Whether :meth:`sleep` gives the memory back, which vLLM must be set up for.
        lora_rank: Rank of the adapters that :meth:`sync_adapter` will bring; None for none.
        nf4: Keep the linear layers' weights in 4 bits, as bitsandbytes makes them, which vLLM can on a GPU.
        launched: Of a process that torchrun started, how many consecutive ranks hold the model together (tensor
            parallelism); None for a process alone.

    Raises:
        ModelError: The folder has no safetensors that can be read.
        ValueError: vLLM has no sleep on this device, or no adapters of this rank.
    """

    name = "vllm"
    beside_training = False

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
        sleeps: bool = False,
        lora_rank: int | None = None,
        nf4: bool = False,
        launched: int | None = None,
    ) -> None:
        self._llm: Any = None
        self._sleeps, self._asleep = sleeps, False
        self._launched = launched is not None
        self._lora_rank, self._version = lora_rank, 0
        self._adapter: Any = None
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
        self.dtype = self.takes = dtype
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
        if on_cpu and lora_rank is not None:
            share_one_adapter()
        with process_state_kept(), model_alone(model_path) as folder:
            self._llm = vllm.LLM(
                str(folder),
                dtype=str(dtype).removeprefix("torch."),
                distributed_executor_backend="uni" if launched is None else "external_launcher",
                tensor_parallel_size=launched or 1,
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
                **({"enable_sleep_mode": True} if sleeps else {}),
                **(lora_settings(lora_rank) if lora_rank is not None else {}),
                **({"quantization": "bitsandbytes"} if nf4 else {}),
            )
        # Asked of vLLM: a checkpoint with a head of its own is not tied, whatever its config.json says.
        [self._tied] = self._llm.collective_rpc(repack_tied_heads)
        [self.held_bytes] = self._llm.collective_rpc(held_bytes)
        spell_no_logprobs(self._llm.llm_engine.output_processor)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Rollout]]:
        """Sample ``sampling.n`` rollouts for every prompt.

        Samples are a function of ``sampling.seed`` and the prompt's place, as far as vLLM's batching leaves the numbers
        alike.
        Score log-probabilities come from the pass that sampled the score, where the model got there on its own and
        vLLM reports them at temperature 1; otherwise from a second, one-token pass. Where ``sampling.scores`` says that
        nobody reads them, they are not asked for.

        Raises:
            ConfigError: vLLM cannot compute this model here, which its first pass shows.
            ValueError: An empty or too long prompt, or a temperature and top_p of which vLLM cannot report the sampled
                tokens' log-probabilities (top_p below 1 with a temperature other than 0 and 1); before any work.
        """
        if self._asleep:
            raise RuntimeError("this rollout engine sleeps: sync it before it samples")
        check_prompts(prompts, sampling, self.scale, self.max_model_len, self._vocabulary)
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
        for i, output in zip(later, self._run(contexts, params), strict=True):
            flat = output.outputs[0].logprobs
            scores[i] = self._score(flat, flat.start_indices[0], flat.end_indices[0])
        results: list[list[Rollout]] = [[] for _ in prompts]
        for s, p, score in zip(samples, parsed, scores, strict=True):
            results[s.place].append(build_rollout(self.tokenizer, s.ids, s.logprobs, p, score))
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
        params, thoughts = [], [self.finder.thought(prompt) for prompt in prompts]
        for place, thought in enumerate(thoughts):
            n = sampling.n if sampling.temperature > 0 else 1
            seed = random_stream(sampling.seed, sampling.place(place)).getrandbits(62)  # sample i gets seed + i
            stop = [thought] if thought else verdict
            params.append(self._sampling_params(sampling, score_tokens, sampling.max_tokens, seed, stop, n))
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
                params.append(self._sampling_params(sampling, score_tokens, left, seed, stop))
            outputs = self._run([[*prompts[s.place], *s.ids] for s in going], params)
            for s, output in zip(going, outputs, strict=True):
                s.add(output.outputs[0])
        return samples

    def sync(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Hand the trainer's weights to vLLM (a tied head may be left out) and drop what is cached under the old ones.

        An engine that sleeps is woken first. Adapters that came before are gone. Where it raises, the engine holds a
        part of the new weights, until another sync.

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

        with self._woken(), process_state_kept(), torch.no_grad():
            self._drop_adapter()
            self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs()})
            self._engine.collective_rpc(repack_tied_heads)
        missing = sorted(self._names - left_out - given)
        if missing:
            raise ValueError(f"sync did not get {len(missing)} of the model's weights: {', '.join(missing[:5])}")
        self._forget()

    def sync_adapter(self, save: Callable[[Path], None], size: int) -> None:
        """Hand the trainer's adapter to vLLM, which drops the one before; the base stays as it is.

        Each version has an id and a name of its own, so that nothing cached under an earlier one counts for it.

        Args:
            save: Writes the adapter into a folder, as peft does.
            size: Bytes that it needs there, at most.

        Raises:
            ValueError: vLLM cannot take this adapter over.
        """
        from vllm.lora.request import LoRARequest

        with self._woken(), process_state_kept(), adapter_folder(size) as folder:
            save(folder)
            self._version += 1
            adapter = LoRARequest(f"version-{self._version}", self._version, str(folder))
            self._drop_adapter()
            if not self._engine.llm_engine.add_lora(adapter):
                raise ValueError("vLLM did not take the adapter over")
            self._adapter = adapter
        self._forget()

    def _drop_adapter(self) -> None:
        if self._adapter is not None:
            self._engine.llm_engine.remove_lora(self._adapter.lora_int_id)
            self._adapter = None

    def sleep(self) -> bool:
        """Give weights and cache back to the device until the next sync, where the engine was made to sleep.

        Weights that the next sync brings are dropped (vLLM's level 2). A base under an adapter is kept in the host's
        memory (level 1), since the sync brings the adapter alone.
        """
        if self._sleeps and not self._asleep:
            self._engine.sleep(level=2 if self._lora_rank is None else 1)
            self._asleep = True
        return self._asleep

    @contextmanager
    def _woken(self) -> Iterator[None]:
        """Wake the weights, let the caller sync, then wake the cache.

        The wake brings back weights of before the sleep, or none, so a sync in front of it would be lost; the cache's
        memory is not needed until after it.
        """
        if self._asleep:
            gc.collect()
            torch.cuda.empty_cache()  # what the trainer's allocator keeps for itself, vLLM could not have
            self._engine.wake_up(tags=["weights"])
        yield
        if self._asleep:
            self._engine.wake_up(tags=["kv_cache"])
            self._asleep = False

    def _forget(self) -> None:
        """Drop what was computed with earlier weights."""
        if self._engine.reset_prefix_cache() is False:
            raise RuntimeError(
                "vLLM did not drop its prefix cache after the sync: it still holds the old weights' results"
            )

    def sync_adapters(self, model: Any) -> None:
        """Hand over a model's adapters; to an engine that was made for none, the weights that they make.

        These are merged out of place, a tensor at a time.

        Raises:
            ValueError: As :meth:`sync` and :meth:`sync_adapter` do.
        """
        if self._lora_rank is None:
            self.sync(merged_tensors(model))
        else:
            self.sync_adapter(
                partial(save_adapters, model), 2**20 + sum(t.nbytes for t in adapter_tensors(model).values())
            )

    def close(self) -> None:
        """Free the weights and the cache."""
        if self._llm is None:
            return
        llm, self._llm = self._llm, None
        with process_group_kept() if self._launched else nullcontext():
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

    def _params(self, score_tokens: bool, **kwargs: Any) -> Any:
        """Parameters of a request; text is made only where strings can stop it."""
        from vllm import SamplingParams

        wanted: dict[str, Any] = {"logprob_token_ids": list(self.scale.score_ids)} if score_tokens else {"logprobs": 0}
        return SamplingParams(flat_logprobs=True, detokenize=bool(kwargs.get("stop")), **wanted, **kwargs)

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
                outputs = self._engine.generate(
                    tokens, [params[i] for i in order], use_tqdm=False, lora_request=self._adapter
                )
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
