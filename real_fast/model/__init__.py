"""The model: loading and checking it, the policy around it, the frozen reference, what its folder says of judging.

What is minimised on it lives in methods/, how it samples in rollout/.
"""
