"""Rollouts by vLLM, in this process. All that depends on vLLM's interface is here and in vllm_inside.py."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from real_fast.errors import ConfigError
from real_fast.model.folder import model_alone
from real_fast.model.lora import adapter_tensors, merged_tensors, save_adapters
from real_fast.rollout.adapter_folder import adapter_folder
from real_fast.rollout.process_state import process_state_kept
from real_fast.rollout.vllm_inside import (
    held_bytes,
    llm_settings,
    lora_settings,
    process_group_kept,
    repack_tied_heads,
    set_environment,
    share_one_adapter,
    spell_no_logprobs,
)
from real_fast.rollout.vllm_sampling import VllmSampling
from real_fast.score.scale import ScoreScale
from real_fast.types import Rollout, SamplingParams


def import_vllm() -> Any:
    """Import vLLM, set up to run inside this process and to leave the trainer's cores alone."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over as tensors, not through files
    set_environment()
    with process_state_kept():
        import vllm

    return vllm


class VllmEngine(VllmSampling):
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
        super().__init__(
            model_path,
            tokenizer,
            scale,
            dtype=dtype,
            max_model_len=max_model_len,
            top_p=top_p,
            trust_remote_code=trust_remote_code,
        )
        vllm = import_vllm()
        from vllm.platforms import current_platform

        on_cpu = current_platform.device_type == "cpu"
        if on_cpu and lora_rank is not None:
            share_one_adapter()
        with process_state_kept(), model_alone(model_path) as folder:
            self._llm = vllm.LLM(
                str(folder),
                distributed_executor_backend="uni" if launched is None else "external_launcher",
                tensor_parallel_size=launched or 1,
                use_tqdm_on_load=False,
                **llm_settings(
                    dtype=dtype,
                    max_model_len=max_model_len,
                    max_num_seqs=max_num_seqs,
                    gpu_memory_utilization=gpu_memory_utilization,
                    processed=self._processed,
                    seed=seed,
                    trust_remote_code=trust_remote_code,
                    on_cpu=on_cpu,
                ),
                **({"enable_sleep_mode": True} if sleeps else {}),
                **(lora_settings(lora_rank) if lora_rank is not None else {}),
                **({"quantization": "bitsandbytes"} if nf4 else {}),
            )
        # Asked of vLLM: a checkpoint with a head of its own is not tied, whatever its config.json says.
        [self._tied] = self._llm.collective_rpc(repack_tied_heads)
        [self.held_bytes] = self._llm.collective_rpc(held_bytes)
        spell_no_logprobs(self._llm.llm_engine.output_processor)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Rollout]]:
        """As :meth:`VllmSampling.generate`.

        Raises:
            ConfigError: vLLM cannot compute this model here, which its first pass shows.
            RuntimeError: The engine sleeps.
            ValueError: As :meth:`VllmSampling.generate` says.
        """
        if self._asleep:
            raise RuntimeError("this rollout engine sleeps: sync it before it samples")
        return super().generate(prompts, sampling)

    def sync(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Hand the trainer's weights to vLLM (a tied head may be left out) and drop what is cached under the old ones.

        An engine that sleeps is woken first. Adapters that came before are gone. Where it raises, the engine holds a
        part of the new weights, until another sync.

        Raises:
            ValueError: A name that is not in the model folder's safetensors, or a weight of it that was left out.
        """
        given: set[str] = set()
        pairs = ((name, tensor.to(self.dtype)) for name, tensor in self._to_send(named_tensors, given))
        with self._woken(), process_state_kept(), torch.no_grad():
            self._drop_adapter()
            self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs})
            self._engine.collective_rpc(repack_tied_heads)
        self._check_given(given)
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
