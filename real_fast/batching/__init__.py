"""Packing groups of rollouts into micro-batches.

Tensors and token budgets alone: no loss, no model.
"""
