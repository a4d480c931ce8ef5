"""The processes of a run: what they must agree on, and how a model is spread over them.

It knows modules and tensors; what a Transformers model is made of belongs to `model`, what a run does to `training`.
"""
