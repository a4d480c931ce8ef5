"""Prompts of about one length are computed together: what comes of it is what one pass over all of them gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from real_fast.attention.interface import NAME
from real_fast.rollout import prefill
from real_fast.rollout.prefill import can_join, join, left_padded, parts
from real_fast.rollout.transformers_engine import TransformersEngine
from real_fast.score.scale import ScoreScale
from real_fast.types import SamplingParams


@pytest.fixture(scope="module")
def small_scale(small_tokenizer):
    return ScoreScale.from_tokenizer(small_tokenizer, [1, 2, 3, 4, 5], "So the overall score is ")


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=60).map(lambda some: sorted(some, reverse=True)))
def test_parts_cover_all_and_hold_little_padding(lengths):
    found = parts(lengths)
    assert [place for part in found for place in range(len(lengths))[part]] == list(range(len(lengths)))
    for part in found:
        most = max(prefill._PADDING * lengths[part][0], prefill._FEW)
        assert lengths[part][0] - lengths[part][-1] <= most


def model_of(kind, **more):
    torch.manual_seed(0)
    sizes = {"vocab_size": 2048, "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2}
    config = kind(**sizes, num_attention_heads=6, num_key_value_heads=2, head_dim=8, **more)
    return AutoModelForCausalLM.from_config(config).double().eval()


LENGTHS = (200, 180, 110, 60, 58, 1)


def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 2000, (length,), generator=generator).tolist() for length in LENGTHS]


def test_joined_caches_decode_as_one(monkeypatch):
    """Logits behind the prompts and behind two more tokens, against a cache for each prompt alone, in float64."""
    model, rows = model_of(LlamaConfig), prompts()
    caches = []
    with torch.no_grad():
        for part in parts(LENGTHS):
            ids, mask = left_padded(rows[part])
            out = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True)
            assert can_join(out.past_key_values)
            caches.append(out.past_key_values)
        assert len(caches) == 4 and caches[0].layers[0].keys.shape[:3] == (2, 2, 200)
        cache, mask = join(caches), left_padded(rows)[1]
        for step in range(2):
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            feed = torch.full((len(rows), 1), 7 + step)
            where = torch.tensor(LENGTHS)[:, None] + step
            got = model(feed, attention_mask=mask, position_ids=where, past_key_values=cache).logits[:, -1]
            for row, logits in zip(rows, got, strict=True):
                alone = model(torch.tensor([[*row, 7, 8][: len(row) + 1 + step]])).logits[0, -1]
                torch.testing.assert_close(logits, alone, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("kind", "more"), [(LlamaConfig, {}), (MistralConfig, {"sliding_window": 16})])
def test_samples_are_those_of_one_pass(kind, more, small_tokenizer, small_scale, monkeypatch):
    """With a window, whose cache cannot be joined, all prompts go through one pass."""
    model, sampling = model_of(kind, **more), SamplingParams(n=2, max_tokens=12, seed=3)
    samples, passes = [], []
    model.register_forward_pre_hook(lambda _m, _a, inputs: passes.append(inputs["input_ids"].shape), with_kwargs=True)
    for padding in (1.0, 0.2):
        monkeypatch.setattr(prefill, "_PADDING", padding)
        engine = TransformersEngine(model, small_tokenizer, small_scale)
        passes.clear()
        for _ in range(2):
            samples.append([r for group in engine.generate(prompts(), sampling) for r in group])
        shapes = [shape for shape in passes if shape[1] > 1]
        assert sum(rows * tokens for rows, tokens in shapes) < 2 * 700 or kind is MistralConfig or padding == 1.0
    for other in samples[1:]:
        for one, two in zip(samples[0], other, strict=True):
            assert (one.sampled_ids, one.text) == (two.sampled_ids, two.text)
            got, want = (torch.tensor(x.score_logprobs) for x in (one, two))
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_positions_that_depend_on_the_batch_get_one_pass(small_tokenizer, small_scale):
    """Parts of their own would have other frequencies than the cache that they are joined in."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0}
    model, passes = model_of(LlamaConfig, rope_parameters=rope, max_position_embeddings=512), []
    model.register_forward_pre_hook(lambda _m, _a, inputs: passes.append(inputs["input_ids"].shape), with_kwargs=True)
    engine = TransformersEngine(model, small_tokenizer, small_scale)
    engine.generate(prompts(), SamplingParams(n=1, max_tokens=1, seed=3, answer="none"))
    assert [tuple(shape) for shape in passes if shape[1] > 9] == [(6, 200)]


def test_a_cache_with_windows_is_found_once(small_tokenizer, small_scale):
    model, passes = model_of(MistralConfig, sliding_window=16), []
    model.register_forward_pre_hook(lambda _m, _a, inputs: passes.append(inputs["input_ids"].shape), with_kwargs=True)
    engine = TransformersEngine(model, small_tokenizer, small_scale)
    for _ in range(2):
        engine.generate(prompts(), SamplingParams(n=1, max_tokens=1, seed=3, answer="none"))
    assert [tuple(shape) for shape in passes if shape[1] > 9] == [(2, 200), (6, 200), (6, 200)]


def test_keys_are_read_once_a_decoding_step_and_the_model_is_as_it_was(small_tokenizer, small_scale):
    """As :func:`real_fast.attention.interface.attend` does; Transformers' SDPA would copy them for each query head."""
    model, seen = model_of(LlamaConfig), set()
    model.register_forward_pre_hook(lambda *_: seen.add(model.config._attn_implementation))
    engine = TransformersEngine(model, small_tokenizer, small_scale)
    engine.generate(prompts(), SamplingParams(n=1, max_tokens=4, seed=3))
    assert seen == {NAME} and model.config._attn_implementation == "sdpa"
