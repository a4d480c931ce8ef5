"""Dense masked attention in float64, which every backend is held to."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

CPU = torch.device("cpu")
GROUPS = ((7, (3, 0, 5)), (4, (2, 6, 1)), (3, ()), (1, (1,)))
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 0.05}


def states(tokens, dtype, heads=6, kv_heads=2, size=16, device="cpu", seed=0):
    """Queries, keys and values as a model makes them: [1, T, H, Dh] transposed."""
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(1, tokens, h, size, generator=g, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)]
    return [x.to(device, dtype).transpose(1, 2).requires_grad_() for x in made]


def dense(layout, query, key, value, scale, window):
    """Attention with the layout's mask, in float64."""
    mask = layout.mask(window).to(query.device)
    return scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask, scale=scale, enable_gqa=True
    )


def gradients(out, inputs, seed=1):
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad(out, inputs, upstream.to(out.device, out.dtype))


def check(got, want, dtype):
    torch.testing.assert_close(got.double(), want.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
