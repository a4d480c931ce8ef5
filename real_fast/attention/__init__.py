"""Attention over packed rows [prompt, response 1, ..., response K] through Transformers' AttentionInterface."""
