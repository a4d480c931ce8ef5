"""The Qwen3 shapes that updates are timed at, with random weights, and a tokenizer and a scale for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """A Qwen3 shape with random weights, and the settings under which it fits into 80 GB.

    From 4B on, weights are bf16 and activations are recomputed, for both sides; `optimize`: take AdamW's step too.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    intermediate: int
    tied: bool = True
    half_weights: bool = False
    optimize: bool = True
    vocabulary: int = 151_936
    kv_heads: int = 8
    head_dim: int = 128
    prompts: int = 4
    k: int = 8
    p: int = 1200
    r: int = 250
    budget: int = 6_600
    sequences: int = 4

    def config(self, **more: Any) -> Any:
        """The shape as a Transformers config; `more` goes to it."""
        from transformers import Qwen3Config

        settings: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None} | more
        return Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=self.tied,
            max_position_embeddings=8192,
            **settings,
        )

    def model(self, device: Any) -> Any:
        """The model, on the device."""
        import torch
        from transformers import Qwen3ForCausalLM

        config = self.config()
        torch.manual_seed(0)
        dtype = torch.bfloat16 if self.half_weights else torch.float32
        with torch.device(device):
            model: Any = Qwen3ForCausalLM(config)
        model.to(dtype)
        if self.half_weights:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model


CASES = (
    Case("Qwen3-0.6B", 1024, 28, 16, 3072),
    Case("Qwen3-1.7B", 2048, 28, 16, 6144),
    Case("Qwen3-4B", 2560, 36, 32, 9728, half_weights=True),
    Case("Qwen3-8B", 4096, 36, 32, 12288, tied=False, half_weights=True, optimize=False),
)
SMALL = (
    Case(
        "tiny",
        64,
        2,
        4,
        128,
        vocabulary=512,
        kv_heads=2,
        head_dim=16,
        prompts=2,
        k=4,
        p=48,
        r=16,
        budget=256,
        sequences=2,
    ),
)


def five_scores() -> Any:
    """1 to 5, with made-up tokens."""
    from real_fast.score.scale import ScoreScale

    return ScoreScale((1.0, 2.0, 3.0, 4.0, 5.0), tuple("12345"), tuple(range(16, 21)), "score: ", (60, 61), 1)


def word_tokenizer(vocabulary: int) -> Any:
    """A tokenizer that TRL accepts, made without a download."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(min(vocabulary, 100))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", pad_token="w3", unk_token="w0")
