"""Rows: reading files, what their fields mean, splits, the order of training, the built-in generator.

Rows leave here with their prompt's token ids; nothing here knows what is done with them.
"""
