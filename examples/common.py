"""What the examples share: a model, a few rows, and a `head` argument for the model's forward."""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from real_fast.errors import ModelError
from real_fast.model.head import plain_head
from real_fast.model.load import check_head

SCORES = (1, 2, 3, 4, 5)
PHRASE = "So the overall score is "


def load(name: str | None = None) -> tuple[Any, Any]:
    """A causal language model in float32 and its tokenizer; without a name a random one over bytes, for trying out."""
    if name:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    bytes_alone = Tokenizer(models.BPE(vocabulary, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="<eos>", pad_token="<pad>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.2,  # ten times the usual: so small a model then learns in seconds
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config), tokenizer


def toy_rows(n: int = 32) -> list[dict[str, Any]]:
    """Prompts with a label from 1 to 5: how many of five words are fruits (no fruit and one are both a 1)."""
    draw = random.Random(0)
    rows = []
    for _ in range(n):
        label = draw.choice(SCORES)
        words = draw.sample(["apple", "plum", "fig", "pear", "kiwi"], label) + ["oak", "tin", "sea", "car"][: 5 - label]
        draw.shuffle(words)
        rows.append({"prompt": f"Fruits, 1 to 5? {' '.join(words)}\n", "label": float(label)})
    return rows


def add_head_argument(model: Any) -> None:
    """Let ``model(..., head=f)`` return ``f(hidden, weight)`` from the body's hidden states, without any logits.

    The head runs inside the module's forward: DDP and FSDP see one ordinary forward pass, and FSDP has gathered the
    head's weight by then. Without `head` (generation, say) nothing changes.

    Args:
        model: A causal language model; of PEFT's, the base model is changed.

    Raises:
        ModelError: Logits that are more than ``hidden @ weight.T``: a soft-cap, a scale, a bias, an adapter on the
            head, a copy of it in `modules_to_save`, a quantised head; or learned prompts, which move all positions.
    """
    if any(getattr(peft, "is_prompt_learning", False) for peft in getattr(model, "peft_config", {}).values()):
        raise ModelError("learned prompts (prompt or prefix tuning) move every position: use LoRA instead")
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    check_head(model)
    original = model.forward

    @functools.wraps(original)
    def forward(*args: Any, head: Any = None, **kwargs: Any) -> Any:
        if head is None:
            return original(*args, **kwargs)
        hidden = model.get_decoder()(*args, use_cache=False, **kwargs).last_hidden_state
        weight = plain_head(model).weight  # an adapter may have come since
        device = hidden.device.type
        # What autocast does to a linear layer's operands; then it goes off, as it is inside real_kernels anyhow.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            return head(hidden.to(dtype), weight.to(dtype))

    model.forward = forward
