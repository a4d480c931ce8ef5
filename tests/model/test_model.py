from __future__ import annotations

import pytest
import torch
from torch import nn

from real_fast.errors import ModelError
from real_fast.model.load import check_head, load_model, load_tokenizer, resolve_model
from real_fast.model.policy import Policy

CPU = torch.device("cpu")


def test_missing_models_are_clear_errors(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        resolve_model(str(tmp_path / "none"))
    with pytest.raises(ModelError, match="does not exist"):
        resolve_model("some-model")
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ModelError, match="hub"):
        load_tokenizer("nobody/no-such-model")


def test_pickled_weights_are_refused(tiny_llama, tmp_path):
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(str(tmp_path), CPU, torch.float32)


def test_a_plain_model_passes_and_its_dropout_is_off(tiny_llama, tmp_path):
    model = tiny_llama(attention_dropout=0.3)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), CPU, torch.float32).train()
    ids = torch.arange(5, 15)[None]
    assert torch.equal(loaded(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize(
    ("key", "value"), [("final_logit_softcapping", 30.0), ("logit_scale", 0.0625), ("logits_scaling", 8.0)]
)
def test_logits_that_are_changed_are_refused_by_name(tiny_llama, key, value):
    model = tiny_llama()
    setattr(model.config, key, value)
    with pytest.raises(ModelError, match=f"{key} = {value}"):
        check_head(model)


def test_other_heads_are_refused(tiny_llama):
    model = tiny_llama()
    model.lm_head = nn.Linear(32, 384, bias=True)
    with pytest.raises(ModelError, match="bias in its head"):
        check_head(model)
    model.lm_head = nn.Sequential(nn.Linear(32, 384))
    with pytest.raises(ModelError, match="Sequential"):
        check_head(model)


def test_a_change_without_a_name_is_caught_by_comparing(tiny_llama, monkeypatch):
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda module, inputs, output: torch.tanh(output) * 0.5)
    with pytest.raises(ModelError, match="around the head"):
        check_head(model)


def test_activation_checkpointing_gives_the_same_gradients(tiny_llama):
    from tests.helpers import make_groups, run_update

    plain, recomputed = tiny_llama(), tiny_llama()
    recomputed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    results = []
    for model in (plain, recomputed):
        policy = Policy(model).train()
        results.append(run_update(policy, make_groups()))
    assert recomputed.is_gradient_checkpointing
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad)
