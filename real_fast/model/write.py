"""What a model's folder has: a normal Hugging Face folder, or peft's where adapters are trained."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from real_fast.distributed.shard import whole
from real_fast.model.folder import ADAPTER_WEIGHTS
from real_fast.model.lora import adapter_tensors, is_adapted, merged_tensors, save_adapter_config
from real_fast.runs.parts import Contents, Part, Tensors, nbytes_of
from real_fast.runs.progress import no_foreign_bars


def contents_of(
    model: Any, tokenizer: Any, texts: Mapping[str, str], dtype: torch.dtype, merge: bool = False
) -> Contents:
    """A model, its tokenizer and what goes with it, for :class:`real_fast.runs.writer.FolderWriter`.

    Sharded weights are made whole one at a time, in the dtype that they are written in; no rank has all of them.

    Args:
        model: The model, which stays as it is.
        tokenizer: Its tokenizer.
        texts: Files that go with it, by name: what a judge has to know of how it was trained.
        dtype: Dtype of a whole model's weights on disk; adapters are written in float32.
        merge: Write the whole model, its adapters merged into it, where without it the adapters alone are written.
    """
    adapters = is_adapted(model) and not merge

    def small(folder: Path) -> None:
        if adapters:
            save_adapter_config(model, folder)
            model.generation_config.save_pretrained(folder)  # has the token that ends a verdict
        else:
            _save_config(model, folder, dtype)
        with _refused(folder):
            tokenizer.save_pretrained(folder)
        for name, content in texts.items():
            (folder / name).write_text(content, encoding="utf-8")

    return Contents(small, [_adapters(model) if adapters else _weights(model, dtype, merge)])


@contextmanager
def _refused(folder: Path) -> Iterator[None]:
    """What the system refuses the tokenizers' library, which tells of it by a bare Exception, as the OSError it is."""
    try:
        yield
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if type(error) is not Exception or found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(folder)) from error


def _adapters(model: Any) -> Part:
    tensors = adapter_tensors(model)
    return Part(
        ADAPTER_WEIGHTS.removesuffix(".safetensors"), tensors.items(), nbytes_of(tensors.values()), one_file=True
    )


def _weights(model: Any, dtype: torch.dtype, merge: bool) -> Part:
    cast = dtype if merge or dtype != model.dtype else None
    nbytes = nbytes_of((p for p in model.parameters()), cast)
    convert, at_once = _to_files(model)
    return Part("model", _tensors(model, cast), nbytes, index=True, convert=convert, all_at_once=at_once)


def _tensors(model: Any, dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole parameters, a tied head once, and the buffers that are saved; floating-point ones in `dtype`."""
    if is_adapted(model):
        yield from merged_tensors(model, dtype)
    else:
        for name, parameter in model.named_parameters():
            yield name, whole(parameter, dtype)
    kept = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in kept:
            yield name, buffer.to(dtype) if dtype and buffer.is_floating_point() else buffer


def _save_config(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Everything that save_pretrained() writes but the tensors."""
    with no_foreign_bars():
        model.save_pretrained(folder, state_dict={})
    path = folder / "config.json"
    text = json.loads(path.read_text(encoding="utf-8"))
    # The module's dtype stands there, and the tensors on disk may have another; FSDP renames the class.
    text["dtype"] = str(dtype).removeprefix("torch.")
    text["architectures"] = [name.removeprefix("FSDP") for name in text["architectures"]]
    path.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


def _to_files(model: Any) -> tuple[Callable[[Tensors], Tensors] | None, bool]:
    """What makes a model's tensors those of its files, as save_pretrained() does (a fused expert's are several there).

    Returns:
        The conversion, None where there is none; and whether it takes all tensors together.
    """
    found = getattr(model, "_weight_conversions", None)
    found = get_model_conversion_mapping(model, add_legacy=False) if found is None else found
    if not found:
        return None, False
    several = any(isinstance(one, WeightConverter) and len(one.target_patterns) > 1 for one in found)
    return lambda tensors: revert_weight_conversion(model, tensors), several
