"""Shared-prompt attention: against dense masked attention in float64, and whole models against separate sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers import models as hf

from real_fast.attention.flex import FlexAttention
from real_fast.attention.interface import NAME, pick_backend, prepare, prepared_mask
from real_fast.attention.layout import Layout
from real_fast.attention.sdpa import masked_attention, shared_prompt_attention
from real_fast.attention.support import check_span, enable
from real_fast.errors import ConfigError, SharedPromptError
from tests.attention.dense import CPU, GROUPS, TOLERANCE, check, dense, gradients, states


def test_the_mask_says_what_separate_sequences_say():
    layout = Layout.of_groups(GROUPS)
    first, second = [*range(7), 7, 8, 9, *range(7, 12)], [*range(4), 4, 5, *range(4, 10), 4]
    assert layout.position_ids().tolist() == [*first, *second, 0, 1, 2, 0, 1]
    for window in (None, 3, 8):
        mask = layout.mask(window)
        for start, length, prompt, before in layout.segments.tolist():
            tokens = [*range(prompt, prompt + before), *range(start, start + length)]
            n = len(tokens)
            band = torch.ones(n, n).tril().bool()
            if window:
                band &= torch.ones(n, n).triu(1 - window).bool()
            want = torch.zeros(length, layout.tokens, dtype=torch.bool)
            want[:, tokens] = band[before:]
            assert torch.equal(mask[start : start + length], want)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
@pytest.mark.parametrize("plain", [False, True])
def test_sdpa_against_dense_attention(dtype, window, plain):
    layout = Layout.of_groups(GROUPS)
    inputs = states(layout.tokens, dtype)
    want = dense(layout, *inputs, 0.3, window)
    if plain:
        got = masked_attention(*inputs, layout, 0.3, window)
    else:
        got = prepare(layout, "sdpa", CPU)(*inputs, 0.3, window)
    check(got, want, dtype)
    for mine, theirs in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        check(mine, theirs, dtype)


@given(
    groups=st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(0, 7), max_size=4)), min_size=1, max_size=4),
    window=st.one_of(st.none(), st.integers(1, 12)),
)
def test_sdpa_on_any_layout(groups, window):
    layout = Layout.of_groups(groups)
    inputs = states(layout.tokens, torch.float64, heads=2, kv_heads=1, size=8)
    want, got = dense(layout, *inputs, 0.5, window), prepare(layout, "sdpa", CPU)(*inputs, 0.5, window)
    check(got, want, torch.float64)
    for mine, theirs in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        check(mine, theirs, torch.float64)


def test_the_operator_is_a_proper_custom_operator():
    layout = Layout.of_groups(GROUPS)
    for window in (0, 4):
        torch.library.opcheck(
            shared_prompt_attention, (*states(layout.tokens, torch.float64), layout.segments, 0.3, window)
        )


@pytest.mark.parametrize("window", [None, 3])
def test_flex_mask_and_forward(window):
    """FlexAttention's plain version on the CPU; its kernel needs a GPU."""
    layout = Layout.of_groups(GROUPS)
    flex = FlexAttention(layout, CPU)
    at = torch.arange(layout.tokens)
    seen = flex.mask_mod(window)(0, 0, at[:, None], at[None, :])
    assert torch.equal(seen, layout.mask(window))
    inputs = [x.detach() for x in states(layout.tokens, torch.float32)]
    with torch.no_grad():
        check(flex(*inputs, 0.3, window), dense(layout, *inputs, 0.3, window), torch.float32)


def tiny(family, **changes):
    """A small random model of a family, with weights large enough for attention to matter."""
    sizes = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = {
        "llama": hf.llama.LlamaConfig,
        "mistral": hf.mistral.MistralConfig,
        "qwen2": hf.qwen2.Qwen2Config,
        "qwen3": hf.qwen3.Qwen3Config,
        "olmo3": hf.olmo3.Olmo3Config,
        "gemma3": hf.gemma3.Gemma3TextConfig,
        "gemma2": hf.gemma2.Gemma2Config,
        "gpt_oss": hf.gpt_oss.GptOssConfig,
        "llama4": hf.llama4.Llama4TextConfig,
        "bloom": hf.bloom.BloomConfig,
        "mamba": hf.mamba.MambaConfig,
    }[family](**{**sizes, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


SERVED = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {"sliding_window": None}),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", {}),
    "gemma3": ("gemma3", {"sliding_window": 4, "sliding_window_pattern": 2}),
    "olmo3": ("olmo3", {"sliding_window": 4}),
}


def packed_hidden(model, layout, ids, backend="sdpa"):
    device = ids.device
    return model.base_model(
        input_ids=ids[None],
        position_ids=layout.position_ids()[None].to(device),
        attention_mask=prepared_mask(device),
        shared_prompt=prepare(layout, backend, device),
        use_cache=False,
    ).last_hidden_state[0]


def separate_hidden(model, layout, ids):
    """Every sequence alone; the prompt's own rows once."""
    rows = []
    for start, length, prompt, before in layout.segments.tolist():
        tokens = torch.cat([ids[prompt : prompt + before], ids[start : start + length]])
        rows.append(model.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0, before:])
    return torch.cat(rows)


def compare_models(model, layout, ids, rtol, backend="sdpa", autocast=None):
    device = ids.device
    upstream = torch.randn(layout.tokens, 32, generator=torch.Generator().manual_seed(3)).to(device)
    results = []
    for hidden in (separate_hidden, packed_hidden):
        model.zero_grad()
        with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            out = hidden(model, layout, ids) if hidden is separate_hidden else hidden(model, layout, ids, backend)
        (out.float() * upstream[:, : out.shape[1]]).sum().backward()
        results.append((out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (want, want_grads), (got, got_grads) = results
    scale = float(want.float().abs().max())
    torch.testing.assert_close(got.float(), want.float(), rtol=rtol, atol=rtol * scale)
    assert got_grads.keys() == want_grads.keys()
    for name, grad in got_grads.items():
        scale = float(want_grads[name].float().abs().max())
        torch.testing.assert_close(grad.float(), want_grads[name].float(), rtol=rtol, atol=rtol * max(scale, 1e-6))


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_and_gradients_are_those_of_separate_sequences(name, dtype):
    family, changes = SERVED[name]
    model = tiny(family, **changes)
    enable(model, "sdpa")
    layout = Layout.of_groups(((9, (3, 8, 5)), (6, (4, 1))))
    ids = torch.randint(3, 300, (layout.tokens,), generator=torch.Generator().manual_seed(1))
    if dtype == torch.bfloat16:
        compare_models(model, layout, ids, 0.1, autocast=torch.bfloat16)
    else:
        compare_models(model, layout, ids, 1e-4)


@pytest.mark.parametrize("name", ["mistral-window", "qwen3-window"])
def test_a_forgotten_window_would_be_seen(name):
    """The comparison above can fail: without its window the same model gives other hidden states."""
    family, changes = SERVED[name]
    model = tiny(family, **changes)
    enable(model, "sdpa")
    layout = Layout.of_groups(((9, (3, 8, 5)),))
    ids = torch.randint(3, 300, (layout.tokens,), generator=torch.Generator().manual_seed(1))
    want = separate_hidden(model, layout, ids)
    attention = prepare(layout, "sdpa", CPU)
    out = model.base_model(
        input_ids=ids[None],
        position_ids=layout.position_ids()[None],
        attention_mask=prepared_mask(CPU),
        shared_prompt=lambda q, k, v, scale, _window: attention(q, k, v, scale, None),
        use_cache=False,
    ).last_hidden_state[0]
    assert float((out - want).detach().abs().max()) > 0.05


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma2", {}, "softcap"),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "no SDPA"),
        ("llama4", {"num_local_experts": 2, "layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("bloom", {}, "AttentionInterface"),
        ("mamba", {}, "linear_attention"),
    ],
)
def test_models_that_cannot_share_are_refused_by_name_and_reason(family, changes, reason):
    model = tiny(family, **changes)
    before = model.config._attn_implementation
    with pytest.raises(SharedPromptError, match=rf"{model.config.model_type}.*{reason}.*shared_prompt to false"):
        enable(model, "sdpa")
    assert model.config._attn_implementation in (before, "sdpa")


def test_a_model_whose_layers_drop_the_packed_row_is_refused(monkeypatch):
    model = tiny("llama")
    layer = model.model.layers[1].self_attn
    forward = layer.forward

    def without(*args, shared_prompt=None, **kwargs):
        return forward(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", without)
    with pytest.raises(SharedPromptError, match="1 of its 3 layers"):
        enable(model, "sdpa")


def test_a_layer_that_changes_its_mask_is_refused(monkeypatch):
    model = tiny("llama")
    layer = model.model.layers[2].self_attn
    forward = layer.forward

    def masked(*args, attention_mask=None, **kwargs):
        return forward(*args, attention_mask=attention_mask.expand(1, 1, 18, 23), **kwargs)

    monkeypatch.setattr(layer, "forward", masked)
    with pytest.raises(SharedPromptError, match="change the attention mask"):
        enable(model, "sdpa")


def test_position_embeddings_that_depend_on_the_batch_are_refused_beyond_their_limit():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny("llama", rope_parameters=rope, max_position_embeddings=64)
    enable(model, "sdpa")
    check_span(model, 64)
    with pytest.raises(SharedPromptError, match=r"beyond 64 tokens its dynamic position embedding.*up to 65"):
        check_span(model, 65)
    check_span(tiny("llama"), 10**6)


def test_generation_is_as_before(tiny_llama):
    model = tiny_llama()
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    mask = (ids > 0).long()
    want = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    enable(model, "sdpa")
    assert model.config._attn_implementation == NAME
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), want)


def test_smollm2_itself(smollm2):
    """fp32: the same but for rounding. bf16: no further from the fp32 truth than separate sequences in bf16 are.

    Its first ten layers: the other twenty do the same again.
    """
    layout = Layout.of_groups(((40, (12, 30, 21)), (25, (18, 9))))
    ids = torch.randint(3, 40000, (layout.tokens,), generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(layout.tokens, 576, generator=torch.Generator().manual_seed(3))

    def run(dtype, hidden):
        model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype, num_hidden_layers=10)
        enable(model, "sdpa")
        out = hidden(model, layout, ids)
        (out.float() * upstream).sum().backward()
        return {"hidden": out.detach().float()} | {n: p.grad.float() for n, p in model.named_parameters()}

    def errors(got):
        return {name: float((got[name] - truth[name]).norm() / truth[name].norm()) for name in truth}

    truth = run(torch.float32, separate_hidden)
    assert max(errors(run(torch.float32, packed_hidden)).values()) < 3e-5
    theirs, mine = errors(run(torch.bfloat16, separate_hidden)), errors(run(torch.bfloat16, packed_hidden))
    assert mine["hidden"] < 1.2 * theirs["hidden"]
    # Rounding falls differently: one weight's error may double, but on the whole the errors are alike.
    assert sum(mine.values()) < 1.15 * sum(theirs.values())
    assert all(error < 3 * theirs[name] for name, error in mine.items())


def test_activation_checkpointing_changes_nothing():
    model = tiny("llama")
    enable(model, "sdpa")
    model.train()
    layout = Layout.of_groups(GROUPS)
    ids = torch.randint(3, 300, (layout.tokens,), generator=torch.Generator().manual_seed(1))
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        packed_hidden(model, layout, ids).square().sum().backward()
        grads.append([p.grad.clone() for p in model.base_model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


def test_the_body_compiles_in_one_graph():
    model = tiny("llama", num_hidden_layers=2)
    enable(model, "sdpa")
    body = torch.compile(model.base_model, backend="aot_eager", fullgraph=True, dynamic=True)
    for groups in (GROUPS, ((9, (3, 8, 5)), (6, (4, 1)))):
        layout = Layout.of_groups(groups)
        ids = torch.randint(3, 300, (layout.tokens,), generator=torch.Generator().manual_seed(1))
        want = packed_hidden(model, layout, ids)
        got = body(
            input_ids=ids[None],
            position_ids=layout.position_ids()[None],
            attention_mask=prepared_mask(CPU),
            shared_prompt=prepare(layout, "sdpa", CPU),
            use_cache=False,
        ).last_hidden_state[0]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        mine = torch.autograd.grad(got.square().sum(), model.base_model.layers[0].mlp.up_proj.weight)[0]
        theirs = torch.autograd.grad(want.square().sum(), model.base_model.layers[0].mlp.up_proj.weight)[0]
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_backends_are_picked_by_device_and_dtype():
    cuda = torch.device("cuda")
    assert pick_backend("auto", CPU, torch.bfloat16) == "sdpa"
    assert pick_backend("auto", cuda, torch.bfloat16) == "varlen"
    assert pick_backend("auto", cuda, torch.float32) == "sdpa"
    assert pick_backend("flex", cuda, torch.bfloat16) == "flex"
    with pytest.raises(ConfigError, match=r"train\.attention is flex.*CUDA"):
        pick_backend("flex", CPU, torch.bfloat16)
    with pytest.raises(ConfigError, match="precision"):
        pick_backend("varlen", cuda, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["varlen", "flex", "sdpa"])
@pytest.mark.parametrize("window", [None, 3, 100])
def test_backends_on_the_gpu(backend, window):
    layout = Layout.of_groups(((130, (33, 0, 65)), (4, (2, 6, 1)), (257, (40, 100))))
    inputs = states(layout.tokens, torch.bfloat16, heads=8, size=64, device="cuda")
    want = dense(layout, *inputs, 0.125, window)
    got = prepare(layout, backend, torch.device("cuda"))(*inputs, 0.125, window)
    check(got, want, torch.bfloat16)
    for mine, theirs in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        error = (mine.double() - theirs.double()).norm() / theirs.double().norm()
        assert float(error) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["varlen", "flex"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window"])
def test_models_on_the_gpu(name, backend):
    family, changes = SERVED[name]
    model = tiny(family, head_dim=32, **changes).cuda()
    enable(model, backend)
    layout = Layout.of_groups(((90, (30, 8, 50)), (60, (4, 1))))
    ids = torch.randint(3, 300, (layout.tokens,), generator=torch.Generator().manual_seed(1)).cuda()
    compare_models(model, layout, ids, 0.1, backend, autocast=torch.bfloat16)
