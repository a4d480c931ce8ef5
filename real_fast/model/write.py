"""Writes a model into a folder: a normal Hugging Face folder, or peft's where adapters are trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from real_fast.model.lora import is_adapted, merged_tensors, save_adapters
from real_fast.runs.progress import no_foreign_bars

_SHARD = "5GB"  # files are read, written and checked side by side


def write_model(
    model: Any, tokenizer: Any, folder: Path, texts: Mapping[str, str], dtype: torch.dtype, merge: bool = False
) -> None:
    """Write a model, its tokenizer and what goes with it.

    Args:
        model: The model, which stays as it is.
        tokenizer: Its tokenizer.
        folder: An existing folder.
        texts: Files that go with it, by name: what a judge has to know of how it was trained.
        dtype: Dtype of a whole model's weights on disk; adapters are written in float32.
        merge: Write the whole model, its adapters merged into it, where without it the adapters alone are written.
    """
    if is_adapted(model) and not merge:
        save_adapters(model, folder)
        model.generation_config.save_pretrained(folder)  # has the token that ends a verdict
    elif dtype != model.dtype or merge:
        _write_cast(model, folder, dtype)
    else:
        with no_foreign_bars():
            model.save_pretrained(folder, max_shard_size=_SHARD)
    tokenizer.save_pretrained(folder)
    for name, content in texts.items():
        (folder / name).write_text(content, encoding="utf-8")


def _write_cast(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """A copy of the tensors, not of the module: training goes on as it is. A tied head is listed once."""
    kept = model.state_dict()
    state = dict(merged_tensors(model, dtype))
    state |= {name: b.to(dtype) if b.is_floating_point() else b for name, b in model.named_buffers() if name in kept}
    with no_foreign_bars():
        model.save_pretrained(folder, state_dict=state, max_shard_size=_SHARD)
    # save_pretrained() writes the module's dtype, and the tensors on disk have another.
    config = folder / "config.json"
    text = json.loads(config.read_text(encoding="utf-8")) | {"dtype": str(dtype).removeprefix("torch.")}
    config.write_text(json.dumps(text, indent=2), encoding="utf-8")
