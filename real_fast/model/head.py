"""What the loss takes for the model's head, one weight, and a refusal of heads that are more than it."""

from __future__ import annotations

from typing import Any

from torch import nn

from real_fast.errors import ModelError

# Settings of model configs that change logits around the head's matrix product; (name, value that changes nothing).
_LOGIT_CHANGES = {
    "final_logit_softcapping": None,
    "logit_softcapping": None,
    "output_logits_soft_cap": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "lm_head_multiplier": 1.0,
    "output_multiplier": 1.0,
}


def plain_head(model: Any) -> nn.Linear:
    """The lm_head of a model whose logits are ``hidden_states @ lm_head.weight.T``, as far as can be seen from it.

    Args:
        model: A causal language model, not wrapped by PEFT itself.

    Raises:
        ModelError: A soft-cap, a scale or a bias; a head that is no linear layer, or one with an adapter on it, with a
            copy that is trained instead (PEFT's ``modules_to_save``), or with a quantised weight.
    """
    what = f"model {model.config.name_or_path or model.config.model_type}"
    config = model.config.get_text_config()
    for key, neutral in _LOGIT_CHANGES.items():
        value = getattr(config, key, None)
        if value is not None and value != neutral:
            raise ModelError(f"{what} has {key} = {value}, which the loss does not support: choose another model")
    head = model.get_output_embeddings()
    # A quantised layer is a linear one that computes something else; FSDP's and parametrised ones compute the same.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ModelError(
            f"{what} has the head {type(head).__module__}.{type(head).__name__}, and only a plain nn.Linear is "
            "supported, since the loss reads its weight and would pass over an adapter, a trained copy or a "
            "quantisation: leave lm_head out of the adapter's target_modules and modules_to_save (or merge the "
            "adapter), and out of what is quantised"
        )
    if not head.weight.is_floating_point() or head.weight.element_size() < 2:
        raise ModelError(f"{what} has a quantised head ({head.weight.dtype}): leave lm_head out of what is quantised")
    if getattr(head, "bias", None) is not None:
        raise ModelError(f"{what} has a bias in its head, which the loss does not support: choose another model")
    return head
