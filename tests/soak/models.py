"""Random models that the soak serves and trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# The judge's settings as a run leaves them beside its model.
_JUDGE = {
    "scale": {"values": [1, 2, 3, 4, 5], "phrase": "Score: "},
    "prompt": {"template": "short", "system": "Grade.", "max_tokens": 512},
    "rollout": {"answer": "forced", "max_tokens": 12, "top_p": 1.0},
    "objective": {"renormalize": True},
}


def make_judge(folder: Path, hidden_size: int = 64) -> Path:
    """A judge's folder with random weights in float32 and a tokenizer of one token a byte; vLLM can load it too."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tests.golden.trajectories import make_model

    make_model(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=2,
            num_attention_heads=hidden_size // 32,
            num_key_value_heads=hidden_size // 32,
            head_dim=32,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            initializer_range=0.08,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "real_fast.json").write_text(json.dumps(_JUDGE), encoding="utf-8")
    return folder
