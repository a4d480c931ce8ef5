"""Arithmetic before a run: memory and operations of an update, from a model's config.

No weights are loaded; measured numbers are in benchmarks/.
"""
