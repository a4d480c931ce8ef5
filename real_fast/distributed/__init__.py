"""The processes of a run: what they must agree on, and how a model is spread over them."""
