"""A model folder of any Qwen3 shape, with random weights and a tokenizer, made without a download."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.cases import Case

# Bytes of a file of weights, and how many are written at a time.
SHARD, WRITERS = 2 * 2**30, 4
SPREAD = 0.02  # standard deviation of a weight, as models are initialised


def parameters(case: Case) -> int:
    """Weights of a shape, an embedding and an untied head included."""
    attention = case.hidden * case.head_dim * (2 * case.heads + 2 * case.kv_heads)
    layer = attention + 3 * case.hidden * case.intermediate + 2 * case.hidden + 2 * case.head_dim
    return case.vocabulary * case.hidden * (1 if case.tied else 2) + case.layers * layer + case.hidden


def write_model(folder: Path, case: Case, device: Any) -> None:
    """Write config.json, bf16 weights in several safetensors files, and the tokenizer.

    A folder that is there whole is left as it is; one that is not is made anew.

    Args:
        folder: Where to.
        case: The shape.
        device: Where the random numbers are made: a GPU takes a second for 8 B.

    Raises:
        OSError: There is no room for it.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = byte_tokenizer(case.vocabulary)
    tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = case.config(architectures=["Qwen3ForCausalLM"], dtype="bfloat16", **ends)
    config.save_pretrained(folder)
    _write_weights(folder, config, device, index)


def _write_weights(folder: Path, config: Any, device: Any, index: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from real_fast.planning.count import empty_model

    shards: list[dict[str, Any]] = [{}]
    total = size = 0
    for name, parameter in empty_model(config).named_parameters():
        nbytes = 2 * parameter.numel()
        if size and size + nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = parameter.shape
        size, total = size + nbytes, total + nbytes
    generator = torch.Generator(device).manual_seed(0)

    def made(name: str, shape: Any) -> Any:
        weight = torch.ones(shape, dtype=torch.bfloat16, device=device)
        return weight if "norm" in name else weight.normal_(0, SPREAD, generator=generator)

    names: dict[str, str] = {}
    with ThreadPoolExecutor(WRITERS) as writers:
        written: list[Any] = []
        for i, shard in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            names |= dict.fromkeys(shard, file)
            while len(written) >= WRITERS:  # no more of the model in memory than is being written
                written.pop(0).result()
            tensors = {name: made(name, shape).cpu() for name, shape in shard.items()}
            written.append(writers.submit(save_file, tensors, folder / file, metadata={"format": "pt"}))
        for one in written:
            one.result()
    # Last: it marks the folder as whole.
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}))


def byte_tokenizer(vocabulary: int) -> Any:
    """A tokenizer of one token a byte, and of words that no text is made of: whatever a model samples has a text.

    Args:
        vocabulary: Its size, from 258 on.
    """
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    letters = sorted(ByteLevel.alphabet())
    ends = ("</s>", "<pad>")
    words = letters + [f"Ġx{n}" for n in range(vocabulary - len(letters) - len(ends))]
    made = ByteLevelBPETokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[])
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token=ends[0], pad_token=ends[1])
