"""The parts of a training run around the method: set-up, warm-up, updates, metrics, saving.

The order in which they act is train.py; what is minimised is methods/'s.
"""
