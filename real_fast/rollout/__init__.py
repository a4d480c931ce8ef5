"""Sampling feedback: the engines, and the check that an engine and the trainer agree.

An engine gets token ids and returns rollouts; rewards and losses are not its business.
"""
