"""The score: its scale and tokens, the phrase in front of it, and how a prediction is read from rollouts.

No model runs here; tokens and log-probabilities come in, scores go out.
"""
