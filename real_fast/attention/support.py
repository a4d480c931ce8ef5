"""Which models a shared prompt serves exactly; the others are refused by name and reason, before any work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from real_fast.attention.interface import NAME, Backend, prepare, prepared_mask
from real_fast.attention.layout import Layout
from real_fast.errors import SharedPromptError, UnsupportedAttentionError

WAY_OUT = "set train.shared_prompt to false (every rollout then carries its own prompt)"
_LAYERS = {"full_attention", "sliding_attention"}

# Prompt and response lengths of the packed row that a model is tried on.
_TRIAL = ((5, (3, 4)), (4, (2, 5)))


def enable(
    model: PreTrainedModel,
    backend: Backend,
    computing: Callable[[], AbstractContextManager[None]] = nullcontext,
    tried: bool = False,
) -> None:
    """Route the model's attention through :func:`real_fast.attention.interface.attend`, and try it.

    The model's code is not changed. Calls without a packed row (generation) go to SDPA as before.

    Args:
        model: A causal language model as loaded, with SDPA attention.
        backend: The backend its packed rows will use.
        computing: The context that the model computes on the backend's device in.
        tried: Another model of this kind has been tried, and this one, which cannot compute yet, is not.

    Raises:
        SharedPromptError: The model's layers or attention have something that the packed row cannot reproduce, or its
            hidden states on a small packed row differ from those of separate sequences.
    """
    reason = known_reason(model)
    before = getattr(model.config, "_attn_implementation", None)
    if reason is None:
        model.set_attn_implementation(NAME)
    if reason is None and not tried:
        # What the row means, to the precision of the weights; then that the kernel in use serves this model.
        reason = _trial(model, "sdpa")
        if reason is None and backend != "sdpa":
            with torch.no_grad(), computing():
                reason = _trial(model, backend)
    if reason is not None:
        model.set_attn_implementation(before or "sdpa")
        raise SharedPromptError(f"model {_name(model)} cannot share prompts: {reason}. {WAY_OUT}")


@contextmanager
def decoding(model: PreTrainedModel) -> Iterator[None]:
    """Query heads that share keys read them once a decoding step; Transformers' SDPA would copy all keys for each.

    For a model whose attention is Transformers' SDPA and goes through its AttentionInterface; others stay as they are.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    ours = heads != (getattr(config, "num_key_value_heads", None) or heads)
    ours = ours and getattr(model.config, "_attn_implementation", None) == "sdpa" and known_reason(model) is None
    ours = ours and model._can_set_attn_implementation()
    if ours:
        model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        if ours:
            model.set_attn_implementation("sdpa")


def check_span(model: PreTrainedModel, tokens: int) -> None:
    """Refuse sequences so long that the model's rotary embedding starts to depend on the longest one in the batch.

    Args:
        model: The model.
        tokens: Tokens of the longest prompt and response together.

    Raises:
        SharedPromptError: They are more than the original context of a "longrope" or "dynamic" embedding.
    """
    for kind, limit in rope_of_the_longest(model):
        if tokens > limit:
            raise SharedPromptError(
                f"model {_name(model)} cannot share prompts: beyond {limit} tokens its {kind} position embedding "
                f"depends on the longest sequence of the batch, and here up to {tokens} come. {WAY_OUT}"
            )


def rope_of_the_longest(model: PreTrainedModel) -> list[tuple[str, int]]:
    """Position embeddings of a sequence that depend on the longest one of its batch, and beyond how many tokens."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [part for part in rope.values() if isinstance(part, dict)]
    found = []
    for part in nested or [rope]:
        kind = str(part.get("rope_type", "default"))
        if kind == "longrope" or "dynamic" in kind:
            found.append((kind, part.get("original_max_position_embeddings") or config.max_position_embeddings))
    return found


def known_reason(model: PreTrainedModel) -> str | None:
    """Why a model cannot share prompts as far as its class and config tell, or None."""
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


def _name(model: PreTrainedModel) -> str:
    return f"{model.config.name_or_path or ''} ({model.config.model_type})".strip()


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
    """Compare a small packed row with separate sequences, in training mode. Returns what is wrong, or None."""
    config = model.config.get_text_config()
    device = model.device
    layout = Layout.of_groups(_TRIAL)
    ids = (torch.arange(layout.tokens) * 7 + 11) % min(config.vocab_size, 997)
    # The kernels compute in 16 bits; so do, under autocast, linear layers kept in 16 or 4 beside a float32 embedding.
    mixed = {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16, torch.uint8}
    half = model.dtype == torch.float32 and (backend != "sdpa" or bool(mixed))
    recorder = _Recorder(layout, backend, device)
    training, worst = model.training, 0.0
    model.train()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            packed = _hidden(model, ids, layout.position_ids(), recorder)
            for start, length, prompt, before in layout.segments.tolist():
                tokens = ids[[*range(prompt, prompt + before), *range(start, start + length)]]
                alone = _hidden(model, tokens, torch.arange(len(tokens)))[before:]
                # Token by token: a few columns far larger than the rest would hide everything else in a maximum.
                error = (packed[start : start + length] - alone).norm(dim=1) / alone.norm(dim=1)
                worst = max(worst, float(error.max()))
    except UnsupportedAttentionError as error:
        return str(error)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        return f"its forward pass fails on a packed row ({str(error).strip().splitlines()[0]})"
    finally:
        model.train(training)
    layers = int(config.num_hidden_layers)
    if len(recorder.windows) != layers:
        return f"{layers - len(recorder.windows)} of its {layers} layers do not pass the packed row on to the attention"
    if recorder.windows != (expected := _windows(config, layers)):
        return f"its layers ask for the windows {recorder.windows[:4]}..., and its config says {expected[:4]}..."
    if not worst <= (0.1 if half or model.dtype in (torch.bfloat16, torch.float16) else 1e-3):
        return f"its hidden states of a packed row are off by {worst:.2g} of their size"
    return None


def _hidden(
    model: PreTrainedModel, ids: torch.Tensor, position_ids: torch.Tensor, attention: Any = None
) -> torch.Tensor:
    """[T, D] fp32 hidden states of one row, packed if there is an attention for it."""
    device, inputs = model.device, {}
    if attention is not None:
        inputs = {"shared_prompt": attention, "attention_mask": prepared_mask(device)}
    out = model.base_model(
        input_ids=ids[None].to(device), position_ids=position_ids[None].to(device), use_cache=False, **inputs
    )
    hidden: torch.Tensor = out.last_hidden_state[0].float()
    return hidden


def _windows(config: Any, layers: int) -> list[int | None]:
    """The window of every layer, by the model's config."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds[:layers]]
