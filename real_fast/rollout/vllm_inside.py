"""What reaches into vLLM's own objects, where its interface does not do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from real_fast.utils.onednn import keep_few_products


def set_environment() -> None:
    """What vLLM reads from the environment when it is imported, where the user has not set it."""
    # Its warnings are a page per start about settings chosen here on purpose; sync checks the weights itself.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    keep_few_products()


def llm_settings(
    *,
    dtype: torch.dtype,
    max_model_len: int,
    max_num_seqs: int,
    gpu_memory_utilization: float,
    processed: bool,
    seed: int,
    trust_remote_code: bool,
    on_cpu: bool,
) -> dict[str, Any]:
    """What vLLM is started with for our samples, in this process or in a server's.

    Args:
        dtype: Of weights and computation.
        max_model_len: Longest sequence.
        max_num_seqs: Sequences decoded at a time.
        gpu_memory_utilization: Share of a GPU's memory for weights and cache.
        processed: Report log-probabilities behind temperature and top_p, and not those before.
        seed: vLLM's own.
        trust_remote_code: Run Python code that comes with the model.
        on_cpu: Whether vLLM runs on a CPU. Compiling takes minutes there and buys little, and a prompt computed in two
            parts ends in "CPU Generator does not use offset", because a seeded request is to take its random number
            back.
    """
    whole_prompts = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, max_model_len)}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "enable_prefix_caching": True,
        "enforce_eager": on_cpu,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "gpu_memory_utilization": gpu_memory_utilization,
        "logprobs_mode": "processed_logprobs" if processed else "raw_logprobs",
        "seed": seed,
        "trust_remote_code": trust_remote_code,
        "hf_overrides": {"head_dtype": "float32"},  # bf16 logits come in steps of 1/8, and scores with them
        **(whole_prompts if on_cpu else {}),
    }


def lora_settings(rank: int) -> dict[str, Any]:
    """What vLLM is started with for one adapter at a time; of the ranks that it knows, the next one up."""
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    known = [int(one) for one in get_args(MaxLoRARanks)]
    if rank > max(known):
        raise ValueError(f"vLLM takes adapters up to rank {max(known)}, and this one has {rank}")
    largest = min(one for one in known if one >= rank)
    return {"enable_lora": True, "max_lora_rank": largest, "max_loras": 1, "max_cpu_loras": 1}


def share_one_adapter() -> None:
    """Let vLLM's adapters on a CPU multiply by the one that there is; it copies an adapter out for every token.

    With :func:`lora_settings` the stacked weights have one place. With more places, vLLM's own functions are called.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    ops: Any = lora_ops
    if getattr(ops, "_shares_one_adapter", False):
        return
    shrink, expand = ops.bgmv_shrink, ops.bgmv_expand_slice

    def product(inputs: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return inputs.to(dtype) @ weights.reshape(weights.shape[-2:]).to(dtype).t()

    def shrunk(
        inputs: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, indices: torch.Tensor, scaling: float = 1.0
    ) -> None:
        if len(weights) != 1:
            shrink(inputs, weights, out, indices, scaling)
            return
        found = product(inputs, weights, out.dtype)
        out[:, : found.shape[1]] = scaling * found

    def expanded(
        inputs: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, indices: torch.Tensor, start: int, size: int,
        add_inputs: bool = True,
    ) -> None:  # fmt: skip
        if len(weights) != 1:
            expand(inputs, weights, out, indices, start, size, add_inputs)
            return
        found, part = product(inputs, weights, out.dtype)[:, :size], out[:, start : start + size]
        part.copy_(part + found if add_inputs else found)

    module: Any
    for module in (lora_ops, punica_cpu):  # the second has imported the names
        module.bgmv_shrink, module.bgmv_expand_slice = shrunk, expanded
    ops._shares_one_adapter = True


@contextmanager
def process_group_kept() -> Iterator[None]:
    """vLLM ends torch's process group along with itself, whoever made it; in here, it ends its own groups alone."""
    end = dist.destroy_process_group

    def end_of_its_own(group: Any = None) -> None:
        if group not in (None, dist.group.WORLD):
            end(group)

    dist.destroy_process_group = end_of_its_own
    try:
        yield
    finally:
        dist.destroy_process_group = end


def spell_no_logprobs(processor: Any) -> None:
    """Where text is made, vLLM also spells each token whose log-probability it reports, which nobody reads."""
    add_request = processor.add_request

    def added(request: Any, *args: Any, **kwargs: Any) -> None:
        add_request(request, *args, **kwargs)
        processor.request_states[request.request_id].logprobs_processor.tokenizer = None

    processor.add_request = added


def held_bytes(worker: Any) -> int:
    """Bytes of vLLM's weights and key-value cache, which are in this process."""
    found: dict[int, int] = {}

    def add(one: Any) -> None:
        if isinstance(one, torch.Tensor):
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, list | tuple):
            for part in one:
                add(part)

    model = worker.get_model()
    add([*model.parameters(), *model.buffers(), getattr(worker.model_runner, "kv_caches", [])])
    return sum(found.values())


def repack_tied_heads(worker: Any) -> bool:
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
