"""The attention function that Transformers calls, and which backend stands behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from real_fast.attention.flash import HAS_FLASH_ATTN
from real_fast.attention.flex import FlexAttention
from real_fast.attention.layout import Layout
from real_fast.attention.sdpa import SdpaAttention
from real_fast.attention.varlen import VarlenAttention
from real_fast.errors import ConfigError, UnsupportedAttentionError

Backend = Literal["sdpa", "varlen", "flex"]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, int | None], torch.Tensor]

NAME = "real_fast"
PREPARED_MASK = (1, 1, 1, 1)
_BACKENDS: dict[str, Any] = {"sdpa": SdpaAttention, "varlen": VarlenAttention, "flex": FlexAttention}

# What Transformers hands to every attention function and what changes nothing in ours.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "is_causal", "output_attentions", "position_embeddings"}


def pick_backend(wanted: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of ``train.attention``.

    Args:
        wanted: "auto", "sdpa", "varlen" or "flex".
        device: The policy's device.
        dtype: Dtype of queries and keys.

    Raises:
        ConfigError: A backend that the device or dtype cannot serve.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    if wanted == "auto":
        return "varlen" if device.type == "cuda" and half else "sdpa"
    if wanted != "sdpa" and device.type != "cuda":
        raise ConfigError(f"train.attention is {wanted}, which needs a CUDA device; this run is on {device.type}: sdpa")
    if wanted == "varlen" and not half:
        raise ConfigError("train.attention is varlen, which computes in bf16: set train.precision: bf16, or take sdpa")
    return wanted  # type: ignore[return-value]


def describe(backend: Backend) -> str:
    """The kernel behind a backend, for people to read."""
    varlen = "flash-attn" if HAS_FLASH_ATTN else "PyTorch's flash attention"
    return {"sdpa": "SDPA", "flex": "FlexAttention", "varlen": varlen}[backend]


def prepared_mask(device: torch.device) -> torch.Tensor:
    """A 4-D mask, which Transformers hands on as it is: a packed row needs none, and none is to be built for it."""
    return torch.zeros(PREPARED_MASK, device=device)


def prepare(layout: Layout, backend: Backend, device: torch.device) -> Attention:
    """What a packed row's forward is called with, as ``shared_prompt=``; built once a row, without a device sync."""
    attention: Attention = _BACKENDS[backend](layout, device)
    return attention


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    shared_prompt: Attention | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention function: ours for a packed row, SDPA as ever for everything else (generation).

    Args:
        module: The attention layer.
        query: [B, H, T, Dh].
        key: [B, Hkv, T, Dh].
        value: [B, Hkv, T, Dh].
        attention_mask: For a packed row, :func:`prepared_mask`.
        scaling: Factor on the scores; by default 1 / sqrt(Dh).
        dropout: Must be 0 for a packed row.
        sliding_window: Positions that a token sees, its own included.
        shared_prompt: What :func:`prepare` returned.
        kwargs: Passed on to SDPA.

    Returns:
        [B, T, H, Dh] and None (no attention weights).

    Raises:
        UnsupportedAttentionError: The layer asks for something that the packed row cannot reproduce.
    """
    if shared_prompt is None:
        grouped = query.shape[2] == 1 and query.shape[1] != key.shape[1] and not dropout
        if grouped and all(name in _HARMLESS for name, x in kwargs.items() if x is not None):
            return _decode(query, key, value, attention_mask, scaling), None
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    if attention_mask is None or attention_mask.shape != PREPARED_MASK:
        raise UnsupportedAttentionError("its layers change the attention mask")
    unknown = sorted(name for name, x in kwargs.items() if x is not None and name not in _HARMLESS)
    if unknown:
        raise UnsupportedAttentionError(f"its attention uses {', '.join(unknown)}")
    if dropout:
        raise UnsupportedAttentionError("its attention has dropout")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise UnsupportedAttentionError("its attention has keys of its own beside those of the row")
    if value.shape[-1] != query.shape[-1]:
        raise UnsupportedAttentionError(f"its keys have {query.shape[-1]} columns and its values {value.shape[-1]}")
    if torch.is_autocast_enabled(query.device.type):  # as autocast does for SDPA
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return shared_prompt(query, key, value, scale, sliding_window).transpose(1, 2), None


def _decode(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """One new token per sequence. Query heads that share keys become rows of one product: keys are read once."""
    batch, heads, _, size = query.shape
    folded = query.reshape(batch, key.shape[1], -1, size)
    out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, 1, heads, value.shape[-1])


AttentionInterface.register(NAME, attend)
# Whatever is no packed row gets SDPA's masks; a packed row brings a 4-D mask of its own, which is handed on as it is.
AttentionMaskInterface.register(NAME, sdpa_mask)
