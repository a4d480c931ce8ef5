"""Comparing evaluated runs: finding them, joint resampling, differences with intervals, one table.

It reads predictions from disk and never runs a model.
"""
