"""Which models a shared prompt serves exactly; the others are refused by name and reason, before any work."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from real_fast.attention.interface import NAME, Backend, UnsupportedAttentionError, prepare
from real_fast.attention.layout import Layout

WAY_OUT = "set train.shared_prompt to false (every rollout then carries its own prompt)"
_LAYERS = {"full_attention", "sliding_attention"}

# Prompt and response lengths of the packed row that a model is tried on.
_TRIAL = ((5, (3, 4)), (4, (2, 5)))


class SharedPromptError(ValueError):
    """A model that shared prompts cannot serve."""


def enable(model: PreTrainedModel, backend: Backend) -> None:
    """Route the model's attention through :func:`real_fast.attention.interface.attend`, and try it.

    The model's code is not changed. Calls without a packed row (generation) go to SDPA as before.

    Args:
        model: A causal language model as loaded, with SDPA attention.
        backend: The backend its packed rows will use.

    Raises:
        SharedPromptError: The model's layers or attention have something that the packed row cannot reproduce, or its
            hidden states on a small packed row differ from those of separate sequences.
    """
    reason = _known_reason(model)
    before = getattr(model.config, "_attn_implementation", None)
    if reason is None:
        model.set_attn_implementation(NAME)
        try:
            reason = _trial(model, backend)
        except UnsupportedAttentionError as error:
            reason = str(error)
    if reason is not None:
        model.set_attn_implementation(before or "sdpa")
        what = f"{model.config.name_or_path or ''} ({model.config.model_type})".strip()
        raise SharedPromptError(f"model {what} cannot share prompts: {reason}. {WAY_OUT}")


def _known_reason(model: PreTrainedModel) -> str | None:
    config = model.config.get_text_config()
    if config.model_type != model.config.model_type:
        return "it is a model of several parts, not a text model"
    special = sorted({str(kind) for kind in getattr(config, "layer_types", None) or []} - _LAYERS)
    if special:
        return f"it has layers of type {', '.join(special)}"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention does not go through Transformers' AttentionInterface"
    if not getattr(model, "_supports_sdpa", False):
        return "its attention is more than scaled dot products (Transformers offers no SDPA for it)"
    return None


class _Recorder:
    """Notes which window each layer asked for."""

    def __init__(self, layout: Layout, backend: Backend, device: torch.device) -> None:
        self.attention = prepare(layout, backend, device)
        self.windows: list[int | None] = []

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        self.windows.append(window)
        return self.attention(query, key, value, scale, window)


def _trial(model: PreTrainedModel, backend: Backend) -> str | None:
    """Compare a small packed row with separate sequences. Returns what is wrong, or None."""
    config = model.config.get_text_config()
    device = model.device
    layout = Layout.of_groups(_TRIAL)
    ids = (torch.arange(layout.tokens) * 7 + 11) % min(config.vocab_size, 997)
    sequences, where = [], []
    for start, length, prompt, before in layout.segments.tolist():
        own = list(range(start, start + length))
        sequences.append(ids[[*range(prompt, prompt + before), *own]])
        where.append((own, before))
    half = backend == "varlen" and model.dtype == torch.float32
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            recorder = _Recorder(layout, backend, device)
            packed = _hidden(model, ids, shared_prompt=recorder, position_ids=layout.position_ids())
            difference = size = 0.0
            for tokens, (own, before) in zip(sequences, where, strict=True):
                alone = _hidden(model, tokens)[before:]
                difference = max(difference, float((packed[own] - alone).abs().max()))
                size = max(size, float(alone.abs().max()))
    except TypeError as error:
        return f"its forward takes no shared_prompt ({error})"
    finally:
        model.train(training)
    layers = int(config.num_hidden_layers)
    if len(recorder.windows) != layers:
        return f"{layers - len(recorder.windows)} of its {layers} layers do not pass the packed row on to the attention"
    if recorder.windows != (expected := _windows(config, layers)):
        return f"its layers ask for the windows {recorder.windows[:4]}..., and its config says {expected[:4]}..."
    tolerance = 0.05 if half or model.dtype in (torch.bfloat16, torch.float16) else 1e-3
    if not difference <= tolerance * size:
        return f"its hidden states of a packed row are off by {difference:.2g} of {size:.2g}"
    return None


def _hidden(model: PreTrainedModel, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    device = model.device
    position_ids = inputs.pop("position_ids", torch.arange(len(ids)))
    if "shared_prompt" in inputs:
        inputs["attention_mask"] = prepared_mask(device)
    out = model.base_model(
        input_ids=ids[None].to(device), position_ids=position_ids[None].to(device), use_cache=False, **inputs
    )
    hidden: torch.Tensor = out.last_hidden_state[0].float()
    return hidden


def prepared_mask(device: torch.device) -> torch.Tensor:
    """A 4-D mask, which Transformers hands on as it is: a packed row needs none, and none is to be built for it."""
    return torch.zeros(1, 1, 1, 1, device=device)


def _windows(config: Any, layers: int) -> list[int | None]:
    """The window of every layer, by the model's config."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds[:layers]]
