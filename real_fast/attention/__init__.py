"""Attention over packed sequences in which the rollouts of a prompt share it, registered with Transformers.

It knows the layout of a packed sequence and nothing of judges, scores or training.
"""
